"""How every command ends: with an exit status and, for what a user can mend, one line on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

from hotloop.harness.errors import HotloopError
from hotloop.harness.text import flushed, forgiving, printable

__all__ = ["exit_status", "say"]


def say(text: str) -> None:
    """A line on stderr, where anybody may have closed it."""
    with contextlib.suppress(OSError, ValueError):
        print(f"hotloop: {text}", file=sys.stderr, flush=True)


def exit_status(command: Callable[[], int], interrupted: str = "stopped") -> int:
    """Run a command; returns what its process is to exit with. Anything that is raised is a bug of ours.

    Args:
        interrupted: what is said after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        forgiving(stream)
    try:
        return command()
    except HotloopError as e:
        say(printable(str(e)))
        return e.exit_code
    except KeyboardInterrupt:
        say(interrupted)
        return 130
    except BrokenPipeError:  # nobody reads any more, as after `| head`
        return 1
    except OSError as e:  # the machine's fault: a full disk, a folder that may not be written
        where = f"{e.filename}: " if e.filename else ""
        say(f"{printable(where)}{e.strerror or e}; mend it and start the same command again")
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            flushed(stream)
