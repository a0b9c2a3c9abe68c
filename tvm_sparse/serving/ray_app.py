"""A model on Ray Serve: replicas on a cluster, each with the endpoints of `tvm-sparse serve`.

    serve run tvm_sparse.serving.ray_app:app model=/models/dist threads=2

The model has to be at the same place on every node. Ray spreads requests over replicas, and starts
as many as are needed; putting requests together is each replica's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ray import serve

from ..runtime import Runner
from .app import create_app
from .server import load_model
from .settings import Settings

# What Ray holds back of a replica, rather than to have it refused there.
_MOST_REQUESTS = 64


def app(arguments: Mapping[str, Any]) -> Any:
    """Build the application.

    Parameters
    ----------
    arguments : mapping of str to str
        `model`, and, where they are wanted, `name`, `threads`, `max_batch` and `max_replicas`.

    Returns
    -------
    ray.serve.Application
    """
    threads = int(arguments.get("threads", 1))
    settings = Settings(
        arguments["model"],
        name=arguments.get("name", ""),
        threads=threads,
        # As many cores as the replica asks Ray for.
        instances=1,
        max_batch=int(arguments.get("max_batch", 1)),
    )
    deployed = serve.deployment(
        name=settings.name,
        ray_actor_options={"num_cpus": threads},
        max_ongoing_requests=_MOST_REQUESTS,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": int(arguments.get("max_replicas", 8)),
        },
    )
    return deployed(serve.ingress(create_app(partial(_make, settings)))(_Replica)).bind()


class _Replica:
    """Passes requests to the application, which loads the model as it starts."""


def _make(settings: Settings) -> tuple[Runner, Settings]:
    return load_model(settings), settings
