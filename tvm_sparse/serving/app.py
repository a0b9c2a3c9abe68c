"""The server's application: the endpoints of the Open Inference Protocol, version 2, over ASGI."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from .. import __version__
from ..errors import InputError
from ..runtime import Runner
from .batching import Arrays, Batcher
from .intake import Held, Intake
from .metrics import CONTENT_TYPE, Metrics
from .protocol import InferRequest, describe_model, read_request, write_answer
from .refusal import Refusal, quoted
from .settings import Settings

Result = TypeVar("Result")

_log = logging.getLogger("uvicorn.error")

_HEADER_LENGTH = "Inference-Header-Content-Length"
_JSON, _BINARY = "application/json", "application/octet-stream"

# Longer bodies are read and written in a thread, so that probes are answered meanwhile.
_SHORT = 64 << 10


class Service:
    """One model with its queue.

    Parameters
    ----------
    module : Runner
        The model.
    settings : Settings
        How it is served.
    """

    def __init__(self, module: Runner, settings: Settings) -> None:
        self.module, self.settings = module, settings
        self.metrics = Metrics()
        self.intake = Intake(settings.max_queue, settings.max_request_bytes, settings.timeout)
        self.batcher = Batcher(
            module, settings.max_batch, settings.max_delay_ms / 1e3, self._observe_run
        )
        # JSON takes many times its length in memory while it is read: one at a time.
        self._reading = asyncio.Lock()

    def hurry(self) -> None:
        """Take nothing more, and answer what is here as soon as that can be."""
        self.intake.is_closed = True
        self.batcher.hurry()

    def close(self) -> None:
        """Answer what is queued, and end."""
        self.hurry()
        self.batcher.close()

    def _observe_run(self, rows: int, seconds: float) -> None:
        self.metrics.run_rows.observe(rows)
        self.metrics.run_seconds.observe(seconds)

    # -- endpoints --------------------------------------------------------------------------

    async def server(self, _request: Request) -> Response:
        """Say what this server is."""
        extensions = ["binary_tensor_data", "model_repository"]
        return _json({"name": "tvm-sparse", "version": __version__, "extensions": extensions})

    async def live(self, _request: Request) -> Response:
        """Say that the process runs."""
        return _json({"live": True})

    async def ready(self, _request: Request) -> Response:
        """Say whether requests are taken."""
        is_ready = not self.intake.is_closed
        return _json({"ready": is_ready}, 200 if is_ready else 503)

    async def model(self, request: Request) -> Response:
        """Say what the model takes and gives."""
        self._check_model(request)
        module, settings = self.module, self.settings
        return _json(describe_model(settings.name, settings.version, module.inputs, module.outputs))

    async def model_ready(self, request: Request) -> Response:
        """Say whether requests for the model are taken."""
        self._check_model(request)
        is_ready = not self.intake.is_closed
        data = {"name": self.settings.name, "ready": is_ready}
        return _json(data, 200 if is_ready else 503)

    async def index(self, _request: Request) -> Response:
        """List the models: there is one."""
        name, version = self.settings.name, self.settings.version
        return _json([{"name": name, "version": version, "state": "READY", "reason": ""}])

    async def numbers(self, _request: Request) -> Response:
        """Write what Prometheus reads."""
        return Response(self.metrics.write(), media_type=CONTENT_TYPE)

    async def infer(self, request: Request) -> Response:
        """Run the model."""
        start = time.perf_counter()
        response = await self._answered(request)
        self.metrics.requests.labels(response.status_code).inc()
        self.metrics.request_seconds.observe(time.perf_counter() - start)
        return response

    # -- inference --------------------------------------------------------------------------

    async def _answered(self, request: Request) -> Response:
        try:
            self._check_model(request)
            header_length = _check_headers(request)
            with self.intake.held() as held, self.metrics.held.track_inprogress():
                return await self._infer(request, held, header_length)
        except Refusal as refusal:
            return _error(refusal.status, str(refusal), refusal.headers)
        except InputError as error:
            return _error(400, str(error))
        except ClientDisconnect:
            # Nobody reads this.
            return _error(400, "the client went away before its request was whole")
        except Exception:
            _log.exception("a request failed")
            return _error(500, "the server failed; its log says why")

    async def _infer(self, request: Request, held: Held, header_length: int | None) -> Response:
        body = await held.read(request)
        parsed = await self._read(body, header_length)
        # What JSON has said is in arrays now; what was binary lives on under them.
        size = len(body)
        del body
        outputs = await self._run(parsed)
        size = max(size, sum(array.nbytes for array in outputs.values()))
        model = {"model_name": self.settings.name, "model_version": self.settings.version}
        answer = await _beside(size, lambda: write_answer(parsed, model, outputs))
        if answer.header_length is None:
            return Response(answer.body, media_type=_JSON)
        headers = {_HEADER_LENGTH: str(answer.header_length)}
        return Response(answer.body, media_type=_BINARY, headers=headers)

    async def _read(self, body: bytes, header_length: int | None) -> InferRequest:
        async with self._reading:
            return await _beside(
                len(body) if header_length is None else header_length,
                lambda: read_request(
                    body,
                    header_length,
                    self.module.inputs,
                    self.module.outputs,
                    self.settings.max_sizes,
                ),
            )

    async def _run(self, parsed: InferRequest) -> Arrays:
        answer: Future[Arrays] = self.batcher.submit(parsed.inputs)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(answer), self.settings.timeout)
        except asyncio.TimeoutError:
            seconds = f"{self.settings.timeout:g}"
            raise Refusal(
                503,
                f"the request was not answered in {seconds} seconds: try again",
                {"Retry-After": "1"},
            ) from None

    def _check_model(self, request: Request) -> None:
        name, version = request.path_params["name"], request.path_params.get("version")
        settings = self.settings
        if name != settings.name:
            raise Refusal(404, f"there is no model {quoted(name)}; there is '{settings.name}'")
        if version not in (None, settings.version):
            raise Refusal(
                404, f"'{name}' has no version {quoted(version)}; it has '{settings.version}'"
            )


def create_app(make: Callable[[], tuple[Runner, Settings]]) -> Starlette:
    """Return the application.

    Parameters
    ----------
    make : callable
        Loads the model, when the server starts, and says how it is served.
    """
    services: list[Service] = []

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[dict[str, Any]]:
        service = Service(*await asyncio.to_thread(make))
        services.append(service)
        # For the protocol of its connections.
        yield {"timeout": service.settings.timeout, "hurry": service.hurry}
        await asyncio.to_thread(service.close)
        services.clear()

    def endpoint(name: str) -> Callable[[Request], Any]:
        async def call(request: Request) -> Response:
            try:
                response: Response = await getattr(services[0], name)(request)
            except Refusal as refusal:
                response = _error(refusal.status, str(refusal), refusal.headers)
            return response

        return call

    model = "/v2/models/{name}"
    versions = (model, f"{model}/versions/{{version}}")
    routes = [
        Route("/v2", endpoint("server")),
        Route("/v2/health/live", endpoint("live")),
        Route("/v2/health/ready", endpoint("ready")),
        Route("/v2/repository/index", endpoint("index"), methods=["POST"]),
        Route("/metrics", endpoint("numbers")),
        *(Route(path, endpoint("model")) for path in versions),
        *(Route(f"{path}/ready", endpoint("model_ready")) for path in versions),
        *(Route(f"{path}/infer", endpoint("infer"), methods=["POST"]) for path in versions),
    ]
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: _answer_http, Exception: _answer_failure},
    )


def _check_headers(request: Request) -> int | None:
    """Return how much of a body is JSON; None for all of it."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise Refusal(415, f"a body in the encoding {quoted(encoding)} is not read")
    kind = request.headers.get("content-type", _JSON).partition(";")[0].strip().lower()
    length = request.headers.get(_HEADER_LENGTH)
    if length is None:
        if kind != _JSON:
            raise Refusal(
                415,
                f"a body of the type {quoted(kind)} is not read: send {_JSON}, or {_BINARY} "
                f"with {_HEADER_LENGTH}",
            )
        return None
    if kind not in (_JSON, _BINARY):
        raise Refusal(415, f"a body of the type {quoted(kind)} is not read: send {_BINARY}")
    if not (length.isascii() and length.isdigit() and len(length) < 20):
        raise Refusal(400, f"{_HEADER_LENGTH} is no number of bytes: {quoted(length)}")
    return int(length)


async def _beside(size: int, work: Callable[[], Result]) -> Result:
    """Do long work in a thread, and short work at once."""
    return work() if size <= _SHORT else await asyncio.to_thread(work)


def _json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(data), status, headers, media_type=_JSON)


def _error(status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    return _json({"error": sentence}, status, headers)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _error(404, f"there is nothing at {quoted(request.url.path)}")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return _error(405, f"this address takes {allowed}", {"Allow": allowed})
    return _error(error.status_code, error.detail)


async def _answer_failure(_request: Request, _error_: Exception) -> Response:
    return _error(500, "the server failed; its log says why")
