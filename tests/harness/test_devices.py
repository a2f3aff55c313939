"""Which GPU is used, what is said of one that cannot be, and who else computes on it. NVML is a stand-in."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hotloop.harness import machine
from hotloop.harness.errors import DeviceError, LockedError, UsageError
from hotloop.harness.gpu import between_runs, devices, neighbours, nvml
from hotloop.harness.gpu.devices import Signs, chosen, gpus_at, named, signs, usable, visible, why_unusable
from hotloop.harness.gpu.nvml import Gpu
from hotloop.harness.gpu.toolchain import Build
from hotloop.harness.paths import project_root
from hotloop.harness.sandbox.process import child_environment
from tests.harness.fake_nvml import H100, SMALL, STAND_INS, FakeNvml

# ---- the choice

BIG, LITTLE = Gpu(0, "GPU-aa11", name="H100"), Gpu(1, "GPU-bb22", name="T400")
CARD = Gpu(2, "GPU-cc33", name="H100", sliced=True)
SLICES = [
    Gpu(2, f"MIG-{n}", name="H100 MIG", card="GPU-cc33", part=p) for n, p in (("d1", "1/0"), ("d2", "2/0"))
]  # fmt: skip
CARDS = [BIG, LITTLE, CARD, *SLICES]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, [BIG, LITTLE, *SLICES]), ("0", [BIG]), ("1,0", [LITTLE, BIG]), (" 1 , 0 ", [LITTLE, BIG]),
        ("GPU-bb22", [LITTLE]), ("GPU-bb", [LITTLE]), ("gpu-BB22", [LITTLE]), ("2", SLICES), ("GPU-cc33", SLICES),
        ("MIG-d2", [SLICES[1]]), ("MIG-GPU-cc33/2/0", [SLICES[1]]), ("0,0", [BIG]), ("1,-1,0", [LITTLE]),
        ("0,GPU-zz,1", [BIG]),  # as CUDA: what comes after one that is not there is not seen
    ],
)  # fmt: skip
def test_cuda_visible_devices_names_them(wanted: str | None, found: list[Gpu]) -> None:
    assert visible(CARDS, wanted) == found
    assert visible(CARDS, wanted, "PCI_BUS_ID") == found


@pytest.mark.parametrize("wanted", ["", "-1", "7", "NoDevFiles", "GPU-", "GPU-zz", "MIG-d", "MIG-GPU-cc33/9/9", "0.0"])
def test_what_hides_all_is_an_error_that_names_them(wanted: str) -> None:
    with pytest.raises(DeviceError, match=r"leaves no GPU .*GPU-aa11.*MIG-d2.*--device cpu") as e:
        visible(CARDS, wanted)
    assert len(str(e.value).splitlines()) == 1


def test_a_number_among_different_cards_says_nothing_in_cudas_own_order() -> None:
    with pytest.raises(DeviceError, match=r"name one by its uuid: .*GPU-bb22"):
        visible(CARDS, "1", "FASTEST_FIRST")
    assert visible(CARDS, "GPU-bb22", "FASTEST_FIRST") == [LITTLE]
    twins = [BIG, Gpu(1, "GPU-ee", name="H100")]
    assert visible(twins, "1", "FASTEST_FIRST") == [twins[1]]


def test_the_chosen_one_is_spoken_of_by_its_uuid(gpus: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.says(H100, SMALL)
    ours = chosen()
    assert ours is not None
    assert (ours.uuid, ours.node, ours.capability) == ("GPU-aa", "/dev/nvidia3", (9, 0))
    assert machine.gpu_memory_gib() == pytest.approx(81559 / 1024)  # not the small card's
    told = {"name": "NVIDIA H100 80GB HBM3", "memory": "81559 MiB", "driver": "580.65.06", "uuid": "GPU-aa"}
    assert machine.environment("cuda", 2)["gpu"] == told
    assert machine.environment("cpu", 2)["gpu"] is None
    assert machine.mfu_percent("cuda", 1e9, 4e5) == pytest.approx(100 * 4e14 / 989.5e12)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bb")
    devices.gpus.cache_clear()
    assert [g.uuid for g in machine.gpus()] == ["GPU-bb"]
    assert machine.environment("cuda", 2)["gpu"]["name"] == "NVIDIA T400"
    with pytest.raises(DeviceError, match="no GPU 0 of those in CUDA_VISIBLE_DEVICES; nvidia-smi shows 1"):
        gpus_at([0])
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert child_environment(1)["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_slices_of_a_card_have_their_own_memory_and_files(
    gpus: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "CAPABILITIES", tmp_path)
    for path, minor in (("gi2/access", 30), ("gi2/ci0/access", 31)):
        (tmp_path / "gpu3/mig" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "gpu3/mig" / path).write_text(f"DeviceFileMinor: {minor}\nDeviceFileMode: 292\n")
    parts = [{"uuid": f"MIG-{i}", "name": "H100 MIG", "memory_mib": 40448, "gi": i, "ci": 0} for i in (1, 2)]
    gpus.says(H100 | {"slices": parts})
    first, second = machine.gpus()
    assert (first.uuid, first.memory_gib, first.card, first.caps) == ("MIG-1", 39.5, "GPU-aa", ())
    assert second.caps == ("/dev/nvidia-caps/nvidia-cap30", "/dev/nvidia-caps/nvidia-cap31")
    assert second.node == "/dev/nvidia3"
    assert machine.mfu_percent("cuda", 1e9, 4e5) is None  # nobody knows a slice's peak
    gpus.says(H100 | {"slices": []})
    with pytest.raises(DeviceError, match="divided by MIG and has no slice; make one"):
        chosen()


def test_gpus_side_by_side_are_named_by_numbers(gpus: FakeNvml) -> None:
    gpus.says(H100, H100 | {"uuid": "GPU-bb"})
    assert [g.uuid for g in named("1,0")] == ["GPU-bb", "GPU-aa"]
    for words, error in (("0,x", "not a list of numbers"), ("0,0", "names one twice")):
        with pytest.raises(UsageError, match=error):
            named(words)


# ---- one that is there and cannot be used


@pytest.mark.parametrize(
    ("found", "trouble", "words"),
    [
        (Signs(module=True, nodes=True), "Driver Not Loaded", "its driver does not work (Driver Not Loaded)"),
        (Signs(module=True), "RM has detected an NVML/RM version mismatch.", "reboot"),
        (Signs(nodes=True), "Insufficient Permissions", "/dev/nvidia*"),
        (Signs(module=True), "NVML Shared Library Not Found", "nvidia-utils"),
        (Signs(module=True, container=True), "NVML Shared Library Not Found", "--gpus all"),
        (Signs(pci=True, container=True), "NVML Shared Library Not Found", "--gpus all"),
        (Signs(pci=True), "NVML Shared Library Not Found", "install NVIDIA's driver, 580 or newer"),
        (Signs(pci=True, nouveau=True), "NVML Shared Library Not Found", "nouveau"),
        (Signs(wsl=True), "NVML Shared Library Not Found", "driver on Windows"),
        (Signs(wsl=True, container=True), "NVML Shared Library Not Found", "driver on Windows"),
        (Signs(nodes=True), "", "it shows no GPU"),
        (Signs(pci=True), "nvidia-ml-py is not installed", "make install"),
    ],
)  # fmt: skip
def test_what_is_there_and_cannot_be_asked_has_a_cure(found: Signs, trouble: str, words: str) -> None:
    said = why_unusable(found, trouble)
    assert words in said and said.startswith("there is a GPU and it cannot be used: ")
    assert len(said.splitlines()) == 1


def test_signs_of_a_gpu_without_its_library(tmp_path: Path) -> None:
    def add(path: str, text: str = "") -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert not signs(tmp_path)
    for name, vendor, kind in (("0", "0x8086", "0x030000"), ("1", "0x10de", "0x040300")):  # Intel's; NVIDIA's sound
        add(f"sys/bus/pci/devices/{name}/vendor", vendor + "\n")
        add(f"sys/bus/pci/devices/{name}/class", kind + "\n")
    assert not signs(tmp_path)
    add("sys/bus/pci/devices/2/vendor", "0x10de\n")
    add("sys/bus/pci/devices/2/class", "0x030200\n")
    assert signs(tmp_path) == Signs(pci=True)
    (tmp_path / "drivers/nouveau").mkdir(parents=True)
    (tmp_path / "sys/bus/pci/devices/2/driver").symlink_to(tmp_path / "drivers/nouveau")
    assert signs(tmp_path).nouveau
    for path, name in (("dev/dxg", "wsl"), ("dev/nvidia0", "nodes"), ("proc/driver/nvidia/version", "module"),
                       (".dockerenv", "container")):  # fmt: skip
        assert not getattr(signs(tmp_path), name)
        add(path)
        assert getattr(signs(tmp_path), name) and signs(tmp_path)


def test_a_gpu_without_a_driver_is_an_error_and_not_a_night_on_the_cpu(
    gpus: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "signs", lambda: Signs(pci=True))
    for trouble in (12, 9, 999):
        gpus.says(trouble=trouble)
        for ask in (chosen, machine.gpu_memory_gib, lambda: machine.check_device("cuda")):
            with pytest.raises(DeviceError, match=r"there is a GPU and it cannot be used.*--device cpu"):
                ask()
    gpus.says(driver=None)
    monkeypatch.setattr(devices, "signs", lambda: Signs())
    machine.check_device("cpu")


def test_a_machine_without_a_gpu_has_none(gpus: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.says(trouble=12)
    monkeypatch.setattr(devices, "signs", lambda: Signs())
    assert chosen() is None and machine.gpus() == [] and machine.gpu_memory_gib() is None
    with pytest.raises(DeviceError, match="none; check the driver"):
        machine.check_device("cuda")


@pytest.mark.parametrize(
    ("card", "build", "special", "words"),
    [
        ({}, Build("2.13.0+cpu"), {}, "is a build for CPUs; run: "),
        ({}, Build("2.13.0+rocm7", hip="7.0"), {}, "is for AMD's GPUs"),
        ({}, None, {}, "torch is not installed"),
        ({}, Build("2.13.0", "13.0"), {"driver": "550.54.14", "cuda": 12040}, "needs driver 580 .*550.54.14"),
        ({}, Build("2.13.0+cu126", "12.6"), {"driver": "470.1", "cuda": 11040}, "needs driver 525"),
        ({"capability": [7, 5]}, Build("2.13.0", "13.0"), {}, "compute capability 7.5"),
        ({"mode": 2}, Build("2.13.0", "13.0"), {}, "nvidia-smi -c DEFAULT"),
    ],
)  # fmt: skip
def test_a_gpu_that_cannot_be_used_gets_one_line(
    gpus: FakeNvml, monkeypatch: pytest.MonkeyPatch, card: dict[str, Any], build: Build | None,
    special: dict[str, Any], words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(devices, "torch_build", lambda: build)
    gpus.says(H100 | card, **special)
    with pytest.raises(DeviceError, match=words) as e:
        machine.check_device("cuda")
    assert len(str(e.value).splitlines()) == 1


def test_a_gpu_that_can_be_used_is(gpus: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.check_device("cuda")
    gpus.says(driver="550.54.14", cuda=13000)  # with CUDA's compatibility package
    machine.check_device("cuda")
    monkeypatch.setattr(devices.platform, "machine", lambda: "aarch64")
    machine.check_device("cuda")
    for name in ("header_trouble", "compiler_trouble"):
        with monkeypatch.context() as m:
            m.setattr(devices, name, lambda: "it is not there; install it")
            with pytest.raises(DeviceError, match="cannot be used: it is not there; install it"):
                usable(chosen())
    monkeypatch.setattr(devices.platform, "machine", lambda: "riscv64")
    with pytest.raises(DeviceError, match="x86-64 or 64-bit Arm, and this is riscv64"):
        machine.check_device("cuda")
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    for device in ("cpu", "cuda"):
        with pytest.raises(DeviceError, match=r"needs Linux \(on Windows: WSL2\), and this is darwin"):
            machine.check_device(device)


class Cuda:
    """The calls of libcuda that wake it, one of which may fail."""

    def __init__(self, error: int = 0) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*args: Any) -> int:
            if name == "cuDriverGetVersion":
                args[0]._obj.value = 13000
            if name == "cuDeviceTotalMem_v2":
                assert isinstance(args[0]._obj, ctypes.c_size_t)
                args[0]._obj.value = 80 << 30
            return self.error

        return call


def test_cuda_is_awake_before_the_first_child_and_its_errors_have_cures() -> None:
    assert between_runs.touch_cuda(Cuda()) == {"cuda": 13000, "memory": 80 << 30}
    for error, words in (
        (100, "--gpus all"),
        (304, "nvidia_uvm"),
        (802, "fabricmanager"),
        (803, "reboot"),
        (46, "busy"),
    ):
        with pytest.raises(DeviceError, match=f"CUDA error {error}: .*{words}"):
            between_runs.touch_cuda(Cuda(error))
    assert between_runs.cure(719) == "CUDA error 719"


def test_a_gpu_that_is_not_there_cannot_be_touched() -> None:
    if nvml.cards():
        pytest.skip("there is one")
    with pytest.raises(DeviceError, match=r"CUDA does not work on the GPU \(.*libcuda"):
        between_runs.touch(None)


# ---- who computes there


def test_a_stranger_is_who_is_not_below_this_process(gpus: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as ours:
        for contained in (False, True):
            monkeypatch.setattr(neighbours, "_in_container", lambda contained=contained: contained)
            apps = [[ours.pid, "python"], [os.getpid(), "python"], [1, "other"]]
            gpus.says(H100 | {"apps": apps}, SMALL | {"apps": [[2, "elsewhere"]]})
            assert neighbours.strangers() == ["1 other"]
            assert neighbours.strangers(gpus_at([1])[0]) == ([] if contained else ["2 elsewhere"])
            gpus.says(H100 | {"apps": apps[:2]})
            assert neighbours.strangers() == []
        ours.communicate(b"\n")


def test_in_a_container_our_own_child_is_no_stranger(gpus: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the driver calls it there: a pid of the host, 0, nothing at all."""
    monkeypatch.setattr(neighbours, "_in_container", lambda: True)
    for apps in ([[2147483647, None]], [[0, None]], [], None):
        gpus.says(H100 | {"apps": apps})
        assert neighbours.strangers() == []
    gpus.says(H100 | {"apps": [[2147483646, None], [2147483647, None]]})
    assert neighbours.strangers() == ["2147483646 (no name)", "2147483647 (no name)"]
    monkeypatch.setattr(neighbours, "_in_container", lambda: False)
    gpus.says(H100 | {"apps": [[2147483647, None]]})
    assert neighbours.strangers() == ["2147483647 (no name)"]


def test_what_the_driver_does_not_tell_is_no_stranger_for_ever(gpus: FakeNvml) -> None:
    for card, special in ((H100 | {"apps": None}, {}), (H100 | {"error": 999}, {}), (H100, {"trouble": 9})):
        ours = Gpu(0, "GPU-aa")
        gpus.says(card, **special)
        nvml._open = None
        assert neighbours.others(ours) == neighbours.strangers(ours) == []


def test_a_thread_of_ours_is_ours(gpus: FakeNvml) -> None:
    """Some drivers call the thread that made the context a pid."""
    code = (
        "import threading; t = threading.Thread(target=input); t.start(); print(t.native_id, flush=True); t.join()"
    )  # fmt: skip
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as ours:
        assert ours.stdout is not None
        thread = int(ours.stdout.readline())
        assert thread != ours.pid
        gpus.says(H100 | {"apps": [[thread, "python"], [1, "other"]]})
        assert neighbours.strangers() == ["1 other"]
        ours.communicate("\n")


class Clock:
    """A time module whose seconds pass only where one sleeps."""

    def __init__(self, at: Callable[[float], None]) -> None:
        self.now, self.at = 0.0, at

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.at(self.now)


def test_what_the_last_child_left_is_waited_for_and_a_stranger_is_not_for_ever(
    gpus: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared: list[Gpu | None] = []
    monkeypatch.setattr(between_runs, "clear", cleared.append)
    busy = H100 | {"apps": [[4242, "python"]]}
    gpus.says(busy, SMALL | {"apps": [[1, "elsewhere"]]})
    clock = Clock(lambda now: gpus.says() if now >= 19 else None)
    monkeypatch.setattr(between_runs, "time", clock)
    between_runs.fresh("cuda")
    assert clock.now == 19.0 and len(cleared) == 1
    gpus.says(busy)
    monkeypatch.setattr(between_runs, "time", Clock(lambda _: None))
    with pytest.raises(DeviceError, match=r"other processes compute on the GPU \(4242 python\); end them"):
        between_runs.fresh("cuda")
    assert len(cleared) == 1


def test_a_lost_gpu_and_mps_are_told_in_words(gpus: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[Gpu | None] = []
    monkeypatch.setattr(between_runs, "clear", cleared.append)
    ours = chosen()
    between_runs.fresh("cuda", gpu=ours)
    between_runs.fresh("cuda")
    assert cleared == [ours, ours]
    for error, words in ((15, "GPU is lost"), (16, "GPU requires restart"), (6, "Not Found")):
        gpus.says(H100 | {"error": error})
        with pytest.raises(DeviceError, match=f"GPU-aa.* is gone .{words}.*nvidia-smi -r"):
            between_runs.fresh("cuda", gpu=ours)
    gpus.says(H100 | {"apps": [[1, "nvidia-cuda-mps-server"]]})
    with pytest.raises(DeviceError, match=re.escape("echo quit | nvidia-cuda-mps-control")):
        between_runs.fresh("cuda", 0.0, ours)
    assert len(cleared) == 2


NIGHT = """
import sys
sys.path[:0] = [{root!r}, {stand_ins!r}]
from hotloop.harness.gpu import neighbours
from hotloop.harness.gpu.devices import chosen
from hotloop.harness.errors import LockedError
try:
    neighbours.claim(chosen())
    print("has it", flush=True)
except LockedError as e:
    print(e, flush=True)
input()
"""


def test_a_second_night_of_one_user_on_one_gpu_is_refused_in_words(gpus: FakeNvml, tmp_path: Path) -> None:
    gpus.says(H100, H100 | {"uuid": "GPU-bb"})
    program = tmp_path / "hotloop"
    program.write_text(NIGHT.format(root=str(project_root()), stand_ins=str(STAND_INS)))

    def night(**env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(program), "loop"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | env,
        )  # fmt: skip

    def said(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    with night() as first:
        assert said(first) == "has it"
        first_gpu, second_gpu = machine.gpus()
        with pytest.raises(LockedError, match=rf"GPU-aa.*another hotloop of yours, process {first.pid} .*hotloop loop"):
            neighbours.claim(first_gpu)
        neighbours.claim(second_gpu)
        neighbours.claim(second_gpu)  # ours already
        with night(CUDA_VISIBLE_DEVICES="1") as driver:  # below the process that has it, as a watchdog's driver
            assert said(driver) == "has it"
            driver.communicate("\n")
        # Where it computes already, it is told apart from a stranger.
        gpus.says(H100 | {"apps": [[first.pid, "python"]]})
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
            gpus.says(H100 | {"apps": [[stranger.pid, "python"]]})
            assert neighbours.others(first_gpu) == [f"{stranger.pid} python"]
            stranger.communicate(b"\n")
        first.communicate("\n")
    neighbours.claim(first_gpu)  # it ended, and so did its claim


def test_a_child_of_another_hotloop_is_told_apart(gpus: FakeNvml, tmp_path: Path) -> None:
    program = tmp_path / "hotloop"
    program.write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\ninput()\nchild.communicate(b'\\n')\n"
    )
    command = [sys.executable, str(program), "loop"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as night:
        assert night.stdout is not None
        child = int(night.stdout.readline())
        gpus.says(H100 | {"apps": [[child, "python"]]})
        assert neighbours.others() == [f"{child} python, of another hotloop, process {night.pid}"]
        night.communicate("\n")


# ---- the command line, with the stand-in on its path


def cli(*args: str, fake: Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path[:0] = [{str(STAND_INS)!r}, {str(project_root())!r}]\n"
    code += "from hotloop.agent_loop.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=cwd, timeout=120,
        env=os.environ | {"FAKE_NVML": str(fake)} | env,
    )  # fmt: skip


def test_the_command_line_never_turns_to_the_cpu_by_itself(gpus: FakeNvml, tmp_path: Path) -> None:
    """Ran by hand on a machine with torch for CPUs: each of these trained on the CPU, without a word."""
    source = tmp_path / "train.py"
    source.write_bytes((project_root() / "train.py").read_bytes())
    refused = {
        "build for CPUs": {},
        "leaves no GPU": {"CUDA_VISIBLE_DEVICES": ""},
        "too little for the preset h100": {"CUDA_VISIBLE_DEVICES": "1"},
    }
    gpus.says(H100, SMALL)
    for words, env in refused.items():
        done = cli("run", fake=gpus.file, cwd=tmp_path, **env)
        assert done.returncode == 5, done.stderr
        assert words in done.stderr and len(done.stderr.splitlines()) == 1
    done = cli("prepare", fake=gpus.file, cwd=tmp_path, CUDA_VISIBLE_DEVICES="1")
    assert done.returncode == 5 and "--device cpu" in done.stderr
    done = cli("run", "--device", "cpu", fake=gpus.file, cwd=tmp_path)
    assert done.returncode == 3 and "run: hotloop prepare --preset laptop" in done.stderr  # no data in this test
    assert json.loads(gpus.file.read_text())["cards"][0]["uuid"] == "GPU-aa"
