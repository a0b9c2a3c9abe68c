"""How much of what clients send is in a server's memory at the same time, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from .refusal import Refusal

# So many of the longest bodies may be held at the same time.
_BODIES = 8

_SECONDS_TO_RETRY = "1"


class Intake:
    """Counts requests and the bytes of their bodies, and refuses what is too much.

    Parameters
    ----------
    max_requests : int
        As many are held, from their first byte to their answer.
    max_body : int
        The longest body, in bytes.
    timeout : float
        Seconds that a body may take to arrive.
    """

    def __init__(self, max_requests: int, max_body: int, timeout: float) -> None:
        self.max_requests, self.max_body, self.timeout = max_requests, max_body, timeout
        self.requests = 0
        self.bytes = 0
        self.is_closed = False

    @contextmanager
    def held(self) -> Iterator[Held]:
        """Hold a request.

        Raises
        ------
        Refusal
            With 503 when there are too many, or the server is about to end.
        """
        if self.is_closed:
            raise _busy("the server is about to end")
        if self.requests >= self.max_requests:
            raise _busy(f"the server has {self.max_requests} requests already, its --max-queue")
        self.requests += 1
        held = Held(self)
        try:
            yield held
        finally:
            self.requests -= 1
            self.bytes -= held.bytes


class Held:
    """One request that is held."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self.bytes = 0

    async def read(self, request: Request) -> bytes:
        """Read a body, of a known length or in chunks.

        Raises
        ------
        Refusal
            With 413 when it is too long, 408 when it takes too long, and 503 when the bodies of all
            requests together are too much.
        starlette.requests.ClientDisconnect
            When the client goes away.
        """
        limit = self._intake.max_body
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise _too_long(limit)
        try:
            return await asyncio.wait_for(self._read(request), self._intake.timeout)
        except asyncio.TimeoutError:
            seconds = f"{self._intake.timeout:g}"
            raise Refusal(
                408, f"the body did not arrive in {seconds} seconds", {"Connection": "close"}
            ) from None

    async def _read(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            self._count(len(chunk))
            body += chunk
            if len(body) > self._intake.max_body:
                raise _too_long(self._intake.max_body)
        return bytes(body)

    def _count(self, size: int) -> None:
        self.bytes += size
        self._intake.bytes += size
        if self._intake.bytes > _BODIES * self._intake.max_body:
            raise _busy("the bodies of the server's requests take too much memory together")


def _busy(sentence: str) -> Refusal:
    return Refusal(503, f"{sentence}: try again", {"Retry-After": _SECONDS_TO_RETRY})


def _too_long(limit: int) -> Refusal:
    # The rest of it is not read.
    return Refusal(
        413, f"the body is longer than {limit} bytes, this server's limit", {"Connection": "close"}
    )
