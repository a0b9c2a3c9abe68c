"""A sparse compiler plug-in for Apache TVM: pruned models in, specialised libraries out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .compiler import build, compile, inspect, plan
    from .deploy import load_module
    from .errors import SparseError
    from .frontends.loading import load
    from .model import Model
    from .packaging import package
    from .planner import Plan
    from .pruning import prune, prune_module
    from .report import Report
    from .runtime import CompiledModule
    from .session import InferenceSession
    from .tuner import tune
    from .tuning.result import TuningResult

# Public name -> module, loaded on first use: importing this package is cheap and needs no TVM.
_PUBLIC: dict[str, str] = {
    "CompiledModule": "runtime",
    "InferenceSession": "session",
    "Model": "model",
    "Plan": "planner",
    "Report": "report",
    "SparseError": "errors",
    "TuningResult": "tuning.result",
    "build": "compiler",
    "compile": "compiler",
    "inspect": "compiler",
    "load": "frontends.loading",
    "load_module": "deploy",
    "package": "packaging",
    "plan": "compiler",
    "prune": "pruning",
    "prune_module": "pruning",
    "tune": "tuner",
}

__all__ = [
    "CompiledModule",
    "InferenceSession",
    "Model",
    "Plan",
    "Report",
    "SparseError",
    "TuningResult",
    "build",
    "compile",
    "inspect",
    "load",
    "load_module",
    "package",
    "plan",
    "prune",
    "prune_module",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tvm_sparse' has no attribute '{name}'")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


def _autoload() -> None:
    """Register the pipeline "sparse": the entry point `tvm.backends`, called as TVM loads."""
    from .plugin import register

    register()
