"""Install hotloop into the environment of the Python that runs this: `python tools/install.py [--test]`.

Which torch: a machine with an NVIDIA driver gets PyPI's CUDA build; any other the CPU build, which is a tenth of the
size. A matching pair of torch and triton that is already installed is left alone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Pairs that belong together and are tested. The first is what gets installed.
TESTED = {"2.13.0": "3.7.1", "2.11.0": "3.6.0"}


def pip(*args: str) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *args]
    print("+ pip install", *args, flush=True)
    return subprocess.run(command, cwd=ROOT).returncode == 0


def has_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    return bool(smi) and subprocess.run([str(smi), "-L"], capture_output=True).returncode == 0


def torch_is_there(gpu: bool) -> bool:
    try:
        torch, triton = (importlib.metadata.version(n) for n in ("torch", "triton"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return TESTED.get(torch.split("+")[0]) == triton and not (gpu and torch.endswith("+cpu"))


def install_torch(gpu: bool) -> bool:
    torch, triton = next(iter(TESTED.items()))
    if gpu:
        return pip(f"torch=={torch}", f"triton=={triton}")
    # First from the indexes that are configured, then from PyTorch's own.
    wanted = (f"torch=={torch}+cpu", f"triton=={triton}")
    return pip(*wanted) or pip("--extra-index-url", CPU_INDEX, *wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--test", action="store_true", help="also what the tests and the linters need")
    args = parser.parse_args()
    gpu = has_gpu()
    if not torch_is_there(gpu) and not install_torch(gpu):
        print("hotloop: torch could not be installed; see pip's words above", file=sys.stderr)
        return 1
    files = ["lock.txt"] + (["test.txt"] if args.test else [])
    wanted = [a for f in files for a in ("-r", f"requirements/{f}")]
    if not (pip(*wanted) and pip("--no-deps", "--no-build-isolation", "-e", ".")):
        print("hotloop: the installation failed; see pip's words above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
