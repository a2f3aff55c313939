"""The errors of hotloop, as a tree.

    HotloopError                anything a user can mend; the command line prints it as one line
    |-- UsageError              a wrong flag, a missing file, a dirty checkout
    |-- DataError               prepared data is missing, incomplete or not what its manifest says
    |-- SealError               a sealed file (kernels, harness, prepare.py) is not what its seal says
    |-- DeviceError             the device that was asked for is not there or does not work
    |-- RecordError             a chain of records is broken or cannot be written
    |   `-- DiskFullError       no space is left for a record
    |-- SandboxError            no sandbox works here, or a child outlived its end
    |-- LockedError             another driver works on this run tag
    `-- TrialError              one experiment failed; becomes its status and never ends the night

Each message says what is wrong, what was found, and what to do. `exit_code` is what the
command line exits with.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "DataError",
    "DeviceError",
    "DiskFullError",
    "HotloopError",
    "LockedError",
    "RecordError",
    "SandboxError",
    "SealError",
    "TrialError",
    "UsageError",
]


class HotloopError(Exception):
    """Base of every error that a user can mend."""

    exit_code: ClassVar[int] = 1


class UsageError(HotloopError):
    """A wrong flag, a missing file, a dirty checkout."""

    exit_code = 2


class DataError(HotloopError):
    """Prepared data is missing, incomplete or not what its manifest says."""

    exit_code = 3


class SealError(HotloopError):
    """A sealed file is not what its seal says."""

    exit_code = 4


class DeviceError(HotloopError):
    """The device that was asked for is not there or does not work."""

    exit_code = 5


class RecordError(HotloopError):
    """A chain of records is broken or cannot be written."""

    exit_code = 6


class DiskFullError(RecordError):
    """No space is left for a record."""


class LockedError(HotloopError):
    """Another driver works on this run tag."""

    exit_code = 7


class SandboxError(HotloopError):
    """No sandbox works here, or a child outlived its end."""

    exit_code = 8


class TrialError(HotloopError):
    """One experiment failed, with the status that goes into its record.

    Args:
        status: one of `harness.records.model.FAILURES`.
        reason: one line.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status
        self.reason = reason
