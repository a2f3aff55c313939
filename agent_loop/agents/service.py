"""One bounded HTTP exchange with a model's service, in the driver's process.

Redirects are not followed: the key in the request is for the host that the user named. An answer has a size and the
whole exchange a time, however it trickles in. Proxies are those of the environment, certificates the system's.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from dataclasses import dataclass
from typing import Any

import httpx

from hotloop.agent_loop.agents.agent import AgentError
from hotloop.harness.errors import UsageError

__all__ = ["Answer", "Service"]

_CONNECT_S = 10.0
_MOST_BYTES = 8 << 20


@dataclass(frozen=True)
class Answer:
    """What a service answered, whatever its status."""

    status: int
    headers: httpx.Headers
    body: bytes


class Service:
    """An HTTP address and a key for it.

    Raises:
        UsageError: the address is not one of HTTP.
    """

    def __init__(self, url: str, key: str = "") -> None:
        try:
            parts = httpx.URL(url)
            fine = parts.scheme in ("http", "https") and parts.host and (parts.port or 80) in range(1, 1 << 16)
            fine = fine and not (parts.query or parts.fragment or parts.userinfo or any(c.isspace() for c in url))
        except httpx.InvalidURL:
            fine = False
        if not fine:
            raise UsageError(f"--api-url {url!r} is not an address such as http://localhost:8000/v1")
        self.url = url.rstrip("/")
        self._certificates = ssl.create_default_context()
        self._headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "hotloop"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def post(self, path: str, value: Any, deadline: float) -> Answer:
        """Send JSON; `deadline` is of time.monotonic().

        Raises:
            AgentError: no connection, no HTTP, an answer that is too large, or none by the deadline.
        """
        try:
            return asyncio.run(self._post(path, value, max(0.1, deadline - time.monotonic())))
        except (TimeoutError, httpx.TimeoutException):
            raise AgentError(f"{self.url} did not answer in time") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError) as e:  # the last two: of a proxy
            raise AgentError(
                f"{self.url} cannot be reached: {_cause(e) if isinstance(e, httpx.HTTPError) else e}",
                retry_after_s=30.0,
            ) from None

    async def _post(self, path: str, value: Any, left_s: float) -> Answer:
        # A handshake has to end by itself: one that is cancelled leaves its socket open.
        limits = httpx.Timeout(None, connect=min(_CONNECT_S, 0.9 * left_s))
        data = bytearray()
        async with (
            asyncio.timeout(left_s),  # of all of it; httpx's own are for each read
            httpx.AsyncClient(headers=self._headers, timeout=limits, verify=self._certificates) as client,
            client.stream("POST", self.url + path, json=value) as response,
        ):
            async for part in response.aiter_bytes():
                data += part
                if len(data) > _MOST_BYTES:
                    raise AgentError(f"{self.url} answered with more than {_MOST_BYTES >> 20} MiB")
        return Answer(response.status_code, response.headers, bytes(data))


def _cause(error: BaseException) -> str:
    """What is at the bottom of an error; httpx's own words for it are few."""
    while below := error.exceptions[0] if isinstance(error, ExceptionGroup) else error.__cause__ or error.__context__:
        error = below
    refused = isinstance(error, ConnectionError) and error.errno
    return os.strerror(refused) if refused else str(error) or type(error).__name__
