"""One bounded HTTP exchange with a model's service, in the driver's process.

Redirects are not followed: the key in the request is for the host that the user named. An answer has a size and the
whole exchange a time, however it trickles in. Proxies are those of the environment.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import threading
import time
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from hotloop.agent_loop.agents.agent import AgentError
from hotloop.harness.errors import UsageError

__all__ = ["Answer", "Service"]

_CONNECT_S = 10.0
_MOST_BYTES = 8 << 20


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Service:
    """An HTTP address and a key for it.

    Raises:
        UsageError: the address is not one of HTTP.
    """

    def __init__(self, url: str, key: str = "") -> None:
        parts = urlsplit(url.rstrip("/"))
        try:
            fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            fine = False
        if not fine or parts.query or parts.fragment or parts.username or any(c.isspace() for c in url):
            raise UsageError(f"--api-url {url!r} is not an address such as http://localhost:8000/v1")
        self.url, self._parts, self._key = url.rstrip("/"), parts, key

    def post(self, path: str, value: Any, deadline: float) -> Answer:
        """Send JSON; `deadline` is of time.monotonic().

        Raises:
            AgentError: no connection, no HTTP, an answer that is too large, or none by the deadline.
        """
        body = json.dumps(value).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "hotloop"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        left_s = max(0.1, deadline - time.monotonic())
        connection, target, more = self._connection(f"{self._parts.path}{path}", min(_CONNECT_S, left_s))
        late = threading.Event()
        sockets: list[socket.socket] = []  # the connection forgets its own once the answer began

        def stop() -> None:
            late.set()
            for sock in sockets or [connection.sock]:
                with contextlib.suppress(OSError, AttributeError):  # ends a read that each byte would prolong
                    sock.shutdown(socket.SHUT_RDWR)

        watch = threading.Timer(left_s, stop)
        watch.daemon = True
        watch.start()
        try:
            connection.connect()
            sockets.append(connection.sock)
            connection.sock.settimeout(left_s)
            connection.request("POST", target, body, headers | more)
            with connection.getresponse() as response:
                data = response.read(_MOST_BYTES + 1)
        except (OSError, http.client.HTTPException, ValueError) as e:
            if late.is_set() or time.monotonic() >= deadline:
                raise AgentError(f"{self.url} did not answer in time") from None
            words = str(e) or type(e).__name__
            raise AgentError(f"{self.url} cannot be reached: {words}", retry_after_s=30.0) from None
        finally:
            watch.cancel()
            connection.close()
            for sock in sockets:
                sock.close()
        if late.is_set():
            raise AgentError(f"{self.url} did not answer in time")
        if len(data) > _MOST_BYTES:
            raise AgentError(f"{self.url} answered with more than {_MOST_BYTES >> 20} MiB")
        return Answer(response.status, response.headers, data)

    def _connection(self, path: str, timeout_s: float) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
        """Where to connect to, what to ask for there, and headers for a proxy of plain HTTP."""
        parts, host = self._parts, self._parts.hostname or ""
        proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(parts.scheme)
        secure = parts.scheme == "https"
        make = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        if not proxy:
            return make(host, parts.port, timeout=timeout_s), path, {}
        at = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        connection = make(at.hostname or "", at.port or 80, timeout=timeout_s)
        if secure:
            connection.set_tunnel(host, parts.port, headers=_proxy_login(at))
            return connection, path, {}
        return connection, f"http://{parts.netloc}{path}", _proxy_login(at)


def _proxy_login(proxy: SplitResult) -> dict[str, str]:
    if not proxy.username:
        return {}
    words = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()
    return {"Proxy-Authorization": "Basic " + base64.b64encode(words).decode()}
