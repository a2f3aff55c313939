"""Messages between the parent and a child: JSON frames, and raw bytes, over a socket pair.

A frame is a four-byte big-endian length and that many bytes of JSON: an object with a `kind`. The parent trusts
nothing that it reads here: sizes are capped, every wait has an end, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from typing import Any

__all__ = ["MAX_FRAME_BYTES", "Closed", "Malformed", "TimedOut", "Wire"]

MAX_FRAME_BYTES = 1 << 20
_HEADER = struct.Struct(">I")


class Closed(Exception):
    """The other side is gone."""


class Malformed(Exception):
    """The other side sent something that is not a message."""


class TimedOut(Exception):
    """Nothing complete arrived in time."""


class Wire:
    """One end of the connection between the parent and a child.

    Args:
        send_s: how long a message may wait for a reader; None for ever. The parent sets it: who never reads must not
            be able to hold it up.
    """

    def __init__(self, sock: socket.socket, send_s: float | None = None) -> None:
        self._sock = sock
        self._send_s = send_s
        self._kept = bytearray()  # of a message that had not arrived whole when its time was up

    def send(self, kind: str, **fields: Any) -> None:
        """Raises Closed, or TimedOut where nobody reads."""
        body = json.dumps({"kind": kind, **fields}).encode()
        self._send(_HEADER.pack(len(body)) + body)

    def send_bytes(self, data: bytes | memoryview) -> None:
        """Raises Closed, or TimedOut where nobody reads."""
        self._send(data)

    def recv(self, timeout_s: float | None = None) -> dict[str, Any]:
        """The next message. Raises Closed, Malformed or TimedOut (None waits for ever)."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._keep(_HEADER.size, deadline)
        (length,) = _HEADER.unpack_from(self._kept)
        if length > MAX_FRAME_BYTES:
            raise Malformed(f"a message of {length} bytes; at most {MAX_FRAME_BYTES} are read")
        self._keep(_HEADER.size + length, deadline)
        body, self._kept = bytes(self._kept[_HEADER.size :]), bytearray()
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            raise Malformed("a message that is not JSON") from None
        if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
            raise Malformed("a message without a kind")
        return message

    def waiting(self, timeout_s: float = 0.0) -> bool:
        """Whether something that was not read yet has arrived, or does within `timeout_s`."""
        return bool(select.select([self._sock], [], [], timeout_s)[0])

    def recv_bytes(self, count: int, timeout_s: float) -> bytearray:
        """Exactly `count` raw bytes; the caller has capped `count`. Raises Closed or TimedOut."""
        return self._read(count, time.monotonic() + timeout_s)

    def close(self) -> None:
        self._sock.close()

    def _send(self, data: bytes | memoryview) -> None:
        try:
            self._sock.settimeout(self._send_s)
            self._sock.sendall(data)
        except TimeoutError:
            raise TimedOut from None
        except OSError as e:
            raise Closed(str(e)) from None

    def _keep(self, count: int, deadline: float | None) -> None:
        """Until so many bytes are kept."""
        while (missing := count - len(self._kept)) > 0:
            data = memoryview(bytearray(missing))
            self._kept += data[: self._read_into(data, deadline)]

    def _read(self, count: int, deadline: float | None) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            view = view[self._read_into(view, deadline) :]
        return data

    def _read_into(self, view: memoryview, deadline: float | None) -> int:
        """What has arrived, at least a byte; returns the count. Raises Closed or TimedOut."""
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimedOut
        try:
            self._sock.settimeout(left)
            got = self._sock.recv_into(view, min(len(view), 1 << 20))
        except TimeoutError:
            raise TimedOut from None
        except OSError as e:
            raise Closed(str(e)) from None
        if got == 0:
            raise Closed("end of stream")
        return got
