"""A server's process, or several: sockets, signals and workers, which uvicorn does."""

from __future__ import annotations

import asyncio
import logging
import logging.config
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import SparseError
from ..packaged import load
from ..runtime import Runner
from .metrics import SHARED_FOLDER
from .rows import check_rows
from .settings import Settings

if TYPE_CHECKING:
    from starlette.applications import Starlette

_log = logging.getLogger("uvicorn.error")

# The settings reach workers, which are processes of their own, by this variable.
_SETTINGS = "TVM_SPARSE_SERVE"

# Connections of one worker; what comes beyond is answered with 503.
_MAX_CONNECTIONS = 4096


class PatientProtocol(H11Protocol):
    """HTTP, with a client that has so long to send a request's head, or to read its answer.

    uvicorn waits for both forever; a client could keep a server's connections and memory for
    nothing. The application says how long, as `timeout` in the state of its lifespan, and how it
    hears that the server ends, as `hurry`.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        self._wait()

    def shutdown(self) -> None:
        """Hear that the server ends, before it waits for the requests that are under way."""
        super().shutdown()
        self.app_state["hurry"]()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        seconds = self.app_state["timeout"]
        self._deadline = self.loop.call_later(seconds, self._give_up, self.cycle)

    def _give_up(self, last: Any) -> None:
        # Another one is a request that has begun meanwhile.
        if self.cycle is last:
            self.transport.abort()


def serve(settings: Settings) -> None:
    """Serve a model until the process is told to end, with SIGTERM or Ctrl-C.

    It then takes nothing more, answers what is queued, and returns.

    Raises
    ------
    LibraryError, TargetError
        When the model cannot be loaded.
    SparseError
        When its requests cannot be put together as they shall be, or nothing can listen at the
        address.
    """
    import uvicorn

    logging.config.dictConfig(uvicorn.config.LOGGING_CONFIG)
    _check_address(settings)
    # Also with several workers: what they cannot load is said once, and in a sentence.
    module = load_model(settings)
    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "http": PatientProtocol,
        "loop": "asyncio",
        "ws": "none",
        "lifespan": "on",
        "access_log": False,
        "server_header": False,
        "limit_concurrency": _MAX_CONNECTIONS,
        "timeout_graceful_shutdown": max(1, round(settings.grace)),
    }
    # uvicorn sends itself the signal again when it is done with it: the end is no failure.
    signal.signal(signal.SIGTERM, _end)
    try:
        if settings.workers == 1:
            from .app import create_app

            uvicorn.run(create_app(lambda: (module, settings)), **options)
        else:
            del module
            with _shared(settings):
                uvicorn.run(
                    "tvm_sparse.serving.server:worker_app",
                    factory=True,
                    workers=settings.workers,
                    **options,
                )
    except SystemExit as end:
        if end.code:
            raise SparseError("the server could not start; what it said before tells why") from None


def _end(_signal: int, _frame: object) -> NoReturn:
    raise SystemExit(0)


def worker_app() -> Starlette:
    """Return the application of one worker of several; `serve` has told it the settings."""
    from .app import create_app

    settings = Settings.from_json(os.environ[_SETTINGS])

    def make() -> tuple[Runner, Settings]:
        return load_model(settings), settings

    return create_app(make)


def load_model(settings: Settings) -> Runner:
    """Load what is served, and make sure that its requests may be put together.

    Raises
    ------
    LibraryError, TargetError, SparseError
    """
    module = _load(settings)
    if settings.max_batch > 1:
        is_equal = check_rows(module, settings.max_sizes)
        answers = "bit for bit those" if is_equal else "those, but for rounding,"
        _log.info(
            "requests are put together, up to %d rows; answers are %s of requests alone",
            settings.max_batch,
            answers,
        )
    return module


def _load(settings: Settings) -> Runner:
    place = Path(settings.model)

    def opened(instances: int | None) -> Runner:
        if place.is_dir():
            # With what is in it: nothing of TVM has to be installed.
            return load(place, settings.threads, settings.verify, instances=instances)
        from ..deploy import load_module

        return load_module(place, settings.threads, settings.verify, instances=instances)

    module = opened(settings.instances)
    if settings.instances is None and settings.workers > 1:
        return opened(max(1, module.instances // settings.workers))
    return module


def _check_address(settings: Settings) -> None:
    """Say in a sentence what uvicorn would say in a traceback."""
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SparseError(f"cannot listen at {settings.host}:{settings.port}: {reason}") from None


@contextmanager
def _shared(settings: Settings) -> Iterator[None]:
    """Tell workers, which have this process's environment, what they need to know."""
    with tempfile.TemporaryDirectory(prefix="tvm-sparse-serve-") as folder:
        told = {_SETTINGS: replace(settings, model=os.path.abspath(settings.model)).to_json()}
        told[SHARED_FOLDER] = folder
        os.environ.update(told)
        try:
            yield
        finally:
            for name in told:
                del os.environ[name]
