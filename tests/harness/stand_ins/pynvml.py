"""A stand-in for nvidia-ml-py: a machine's GPUs from the JSON file that $FAKE_NVML names, read at each question.

    {"driver": "580.65.06", "cuda": 13000, "trouble": null, "missing": ["nvmlDevice..."], "cards": [
        {"uuid": ..., "name": ..., "memory_mib": ..., "minor": ..., "capability": [9, 0], "sm": 1980, "memory_mhz": ...,
         "temperature": ..., "reasons": 4, "persistence": 1, "mode": 0, "apps": [[pid, name], ...], "error": null,
         "slices": [{"uuid": ..., "memory_mib": ..., "gi": 7, "ci": 0, "apps": [...]}]}]}

A null is "Not Supported", as the real one raises it; `error` is what each question about that card raises;
`missing` are functions that this driver does not have.
"""

import json
import os
import types

NVML_ERROR_UNINITIALIZED = 1
NVML_ERROR_NOT_FOUND = 6
NVML_ERROR_GPU_IS_LOST = 15
NVML_ERROR_RESET_REQUIRED = 16
WORDS = {
    1: "Uninitialized", 3: "Not Supported", 4: "Insufficient Permissions", 6: "Not Found", 9: "Driver Not Loaded",
    12: "NVML Shared Library Not Found", 13: "Function Not Found", 15: "GPU is lost", 16: "GPU requires restart",
    18: "RM has detected an NVML/RM version mismatch.", 999: "Unknown Error",
}  # fmt: skip


class NVMLError(Exception):
    def __init__(self, value):
        super().__init__(value)
        self.value = value

    def __str__(self):
        return WORDS[self.value]


def _machine():
    with open(os.environ["FAKE_NVML"]) as f:
        return json.load(f)


def _given(value):
    if value is None:
        raise NVMLError(3)
    return value


def _thing(handle):
    """The card or slice of a handle."""
    card = _machine()["cards"][handle[0]]
    if card.get("error"):
        raise NVMLError(card["error"])
    return card if len(handle) == 1 else card["slices"][handle[1]]


def nvmlInit():
    if trouble := _machine().get("trouble"):
        raise NVMLError(trouble)


def nvmlSystemGetDriverVersion():
    return _given(_machine().get("driver"))


def nvmlSystemGetCudaDriverVersion_v2():
    return _given(_machine().get("cuda"))


def nvmlSystemGetProcessName(pid):
    for card in _machine()["cards"]:
        for thing in (card, *card.get("slices", [])):
            for known, name in thing.get("apps") or []:
                if known == pid and name:
                    return name
    raise NVMLError(6)


def nvmlDeviceGetCount():
    return len(_machine()["cards"])


def nvmlDeviceGetHandleByIndex(index):
    _thing((index,))
    return (index,)


def nvmlDeviceGetHandleByUUID(uuid):
    for i, card in enumerate(_machine()["cards"]):
        if card["uuid"] == uuid:
            return (i,)
        for j, part in enumerate(card.get("slices", [])):
            if part["uuid"] == uuid:
                return (i, j)
    raise NVMLError(6)


def nvmlDeviceGetComputeRunningProcesses(handle):
    apps = _given(_thing(handle).get("apps"))
    return [types.SimpleNamespace(pid=pid, usedGpuMemory=None) for pid, _ in apps]


def nvmlDeviceGetMemoryInfo(handle):
    return types.SimpleNamespace(total=_given(_thing(handle).get("memory_mib")) << 20)


def nvmlDeviceGetMigMode(handle):
    return [int("slices" in _thing(handle))] * 2


def nvmlDeviceGetMaxMigDeviceCount(handle):
    return 7


def nvmlDeviceGetMigDeviceHandleByIndex(handle, index):
    if index >= len(_thing(handle)["slices"]):
        raise NVMLError(6)
    return (*handle, index)


def nvmlDeviceGetClockInfo(handle, which):
    return _given(_thing(handle).get({1: "sm", 2: "memory_mhz"}[which]))


def nvmlDeviceGetTemperature(handle, sensor):
    assert sensor == 0
    return _given(_thing(handle).get("temperature"))


_FIELDS = {
    "nvmlDeviceGetUUID": "uuid", "nvmlDeviceGetName": "name", "nvmlDeviceGetMinorNumber": "minor",
    "nvmlDeviceGetCudaComputeCapability": "capability", "nvmlDeviceGetPersistenceMode": "persistence",
    "nvmlDeviceGetComputeMode": "mode", "nvmlDeviceGetGpuInstanceId": "gi", "nvmlDeviceGetComputeInstanceId": "ci",
    "nvmlDeviceGetCurrentClocksEventReasons": "reasons", "nvmlDeviceGetCurrentClocksThrottleReasons": "reasons",
}  # fmt: skip


def __getattr__(name):
    if name not in _FIELDS:
        raise AttributeError(name)

    def ask(handle):
        if name in _machine().get("missing", []):
            raise NVMLError(13)
        return _given(_thing(handle).get(_FIELDS[name]))

    return ask
