"""Messages between parent and child that come in pieces."""

from __future__ import annotations

import socket

import pytest

from hotloop.harness.sandbox.wire import TimedOut, Wire


@pytest.mark.parametrize("arrived", [1, 4, 9])  # within the length, between it and the message, within the message
def test_what_came_before_a_time_out_is_the_next_message(arrived: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Wire(ours).send("ready", n=1)
        whole, wire = theirs.recv(1000), Wire(ours)
        theirs.sendall(whole[:arrived])
        with pytest.raises(TimedOut):
            wire.recv(0.01)
        theirs.sendall(whole[arrived:] + whole)
        assert [wire.recv(5.0) for _ in range(2)] == [{"kind": "ready", "n": 1}] * 2
