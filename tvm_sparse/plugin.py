"""The pipeline "sparse" inside TVM's own `tvm.compile` and `relax.build`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PIPELINE = "sparse"


def register() -> None:
    """Make `relax_pipeline="sparse"` known, once, and only where TVM's compiler is there."""
    import tvm

    if getattr(tvm.base, "_RUNTIME_ONLY", False):
        return
    from tvm import relax
    from tvm.relax.pipeline import PIPELINE_MAP

    if PIPELINE not in PIPELINE_MAP:
        relax.register_pipeline(PIPELINE)(sparse_pipeline)


def sparse_pipeline(
    threads: int | None = None,
    force: Mapping[str, str] | None = None,
    forbid: Sequence[str] = (),
) -> Any:
    """Build the pass that takes the place of TVM's default Relax pipeline.

    Weights are found where they are constants of a Relax function; a module built with free
    parameters needs them bound first (`relax.build(..., params=...)` and `tvm_sparse.build(mod,
    target, params)` do that). Layers are decided by the cost model. The target is the one in scope,
    as for every TVM pipeline.

    Parameters
    ----------
    threads, force, forbid
        As for `tvm_sparse.plan`.
    """
    import tvm

    @tvm.transform.module_pass(opt_level=0, name="tvm_sparse.Pipeline")
    def run(mod: Any, _context: Any) -> Any:
        from .pipeline import late_passes
        from .targets import machine_of

        target = tvm.target.Target.current(allow_none=False)
        machine = machine_of(target, threads)
        for name in _entry_functions(mod):
            mod = _sparsify(mod, name, target, threads, force, forbid)
        return late_passes(machine, target)(mod)

    return run


def _entry_functions(mod: Any) -> list[str]:
    """List the functions that a user calls; private ones are called by those."""
    from tvm import relax

    return [
        name.name_hint
        for name, function in mod.functions_items()
        if isinstance(function, relax.Function)
        and function.attrs is not None
        and "global_symbol" in function.attrs.keys()
    ]


def _sparsify(
    mod: Any,
    name: str,
    target: Any,
    threads: int | None,
    force: Mapping[str, str] | None,
    forbid: Sequence[str],
) -> Any:
    """Rewrite one function, which the front end wants to be called `main`."""
    from .compiler import plan
    from .frontends.loading import load
    from .passes.collect_weights import collect_weights
    from .pipeline import lower_model
    from .targets import machine_of

    model = load(_renamed(mod, name, "main"))
    decided = plan(model, target, threads=threads, force=force, forbid=forbid)
    lowered = lower_model(model, collect_weights(model), decided, machine_of(target, threads))
    return _renamed(lowered.mod, "main", name)


def _renamed(mod: Any, old: str, new: str) -> Any:
    """Rename a function that nothing calls, and forget which parameters were weights."""
    import tvm

    functions: dict[Any, Any] = {}
    for name, function in mod.functions_items():
        if name.name_hint == old:
            # Parameters that are not bound are inputs here, whatever a front end said of them.
            for attribute in ("num_input", "params"):
                function = function.without_attr(attribute)
            functions[tvm.ir.GlobalVar(new)] = function.with_attr("global_symbol", new)
        else:
            functions[name] = function
    return tvm.IRModule(functions, attrs=mod.attrs)
