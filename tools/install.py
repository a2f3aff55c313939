"""Install hotloop into the environment of the Python that runs this: `python tools/install.py [--test]`.

Which torch: on a machine with an NVIDIA GPU the build that fits its driver's version; on any other the CPU build, which
is a tenth of the size, or where no index has that the usual one. A matching pair of torch and triton that fits and is
already installed is left alone.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hotloop.harness.gpu.devices import signs, why_unusable  # noqa: E402
from hotloop.harness.gpu.toolchain import (  # noqa: E402
    INDEX,
    TESTED,
    Install,
    build_trouble,
    compiler_trouble,
    driver_version,
    header_trouble,
    installs,
    torch_build,
)


def pip(*args: str) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *args]
    print("+ pip install", *args, flush=True)
    done = subprocess.run(command, cwd=ROOT).returncode == 0
    importlib.invalidate_caches()
    return done


def torch_trouble(driver: str) -> str:
    """Why what is installed will not do; empty where it will. `driver` is empty for a CPU."""
    try:
        torch, triton = (importlib.metadata.version(n) for n in ("torch", "triton"))
    except importlib.metadata.PackageNotFoundError:
        return "torch and triton are not installed"
    if TESTED.get(torch.split("+")[0]) != triton:
        return f"torch {torch} with triton {triton} is not a tested pair"
    return build_trouble(torch_build(), driver) if driver else ""


def install_torch(driver: str) -> str:
    """Install the build for this driver, or for a CPU where it is empty; why none could be, empty where one was."""
    if driver:
        try:
            wanted = installs(driver, platform.machine())
        except ValueError as e:
            return f"{e}; or install for the CPU: --cpu"
    else:
        torch, triton = next(iter(TESTED.items()))
        # First from the indexes that are configured, then from PyTorch's own, which not every network can reach.
        wanted = [Install(f"torch=={torch}+cpu", triton, index) for index in ("", INDEX + "cpu")]
        wanted.append(Install(f"torch=={torch}", triton, ""))
    trouble = "torch could not be installed; see pip's words above"
    for one in wanted:
        if not driver and one == wanted[-1]:
            print("hotloop: no index gave the CPU build; the usual one works on a CPU too, but is ten times the size")
        index = ["--extra-index-url", one.index] if one.index else []
        if pip(*index, one.torch, f"triton=={one.triton}"):
            trouble = torch_trouble(driver)  # an index may give a build for CPUs where one for a GPU was asked for
            if not trouble:
                return ""
    return trouble


def driver_wanted(args: argparse.Namespace) -> str:
    """The version of the driver to install for; empty for a CPU. Raises ValueError: one line with the cure."""
    if args.cpu or args.driver:
        return "" if args.cpu else str(args.driver)
    if driver := driver_version():
        return driver
    if found := signs():
        raise ValueError(f"{why_unusable(found, 'not found')}; or install for the CPU: --cpu")
    return ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--test", action="store_true", help="also what the tests and the linters need")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--cpu", action="store_true", help="the CPU build of torch, also on a machine with a GPU")
    where.add_argument("--driver", metavar="VERSION", help="for a GPU with this driver, as when an image is built")
    args = parser.parse_args(argv)
    if sys.platform != "linux":
        print(f"hotloop: it needs Linux (on Windows: WSL2), and this is {sys.platform}", file=sys.stderr)
        return 1
    try:
        driver = driver_wanted(args)
    except ValueError as e:
        print(f"hotloop: {e}", file=sys.stderr)
        return 1
    trouble = torch_trouble(driver) and install_torch(driver)
    if trouble:
        print(f"hotloop: {trouble}", file=sys.stderr)
        return 1
    files = ["lock.txt"] + (["test.txt"] if args.test else [])
    wanted = [a for f in files for a in ("-r", f"requirements/{f}")]
    if not (pip(*wanted) and pip("--no-deps", "--no-build-isolation", "-e", ".")):
        print("hotloop: the installation failed; see pip's words above", file=sys.stderr)
        return 1
    if driver:  # all is installed; this is what is still in the way of the first kernel
        for missing in filter(None, (header_trouble(), compiler_trouble())):
            print(f"hotloop: WARNING: the GPU's kernels need more: {missing}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
