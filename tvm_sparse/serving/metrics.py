"""What Prometheus reads of a server."""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

# Where the workers of one server keep their numbers, which any of them adds up.
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The numbers of one server, or of one worker of several."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._folder = os.environ.get(SHARED_FOLDER)
        if self._folder:
            _forget_the_dead(Path(self._folder))
        self.requests = Counter(
            "tvm_sparse_requests",
            "Answered requests for inference, by HTTP status.",
            ["code"],
            registry=self._registry,
        )
        self.request_seconds = Histogram(
            "tvm_sparse_request_seconds",
            "From a request's head to its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.run_seconds = Histogram(
            "tvm_sparse_run_seconds",
            "Calls of the model.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.run_rows = Histogram(
            "tvm_sparse_run_rows",
            "Rows of one call of the model; requests where they are not put together.",
            buckets=_ROWS,
            registry=self._registry,
        )
        self.held = Gauge(
            "tvm_sparse_requests_held",
            "Requests that are being read, wait or run.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )

    def write(self) -> bytes:
        """Write the numbers of all workers as Prometheus reads them."""
        if not self._folder:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together, path=self._folder)
        return generate_latest(together)


def _forget_the_dead(folder: Path) -> None:
    """Take out what workers held that have ended: others were started in their place."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        if not Path(f"/proc/{pid}").exists():
            mark_process_dead(pid, str(folder))
