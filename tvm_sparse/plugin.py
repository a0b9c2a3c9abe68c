"""The pipeline "sparse" inside TVM's own `tvm.compile` and `relax.build`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .records import RecordFile

PIPELINE = "sparse"

# The name of a module's `main` while another function takes its place.
_ASIDE = "tvm_sparse_main_aside"


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
    records: str | os.PathLike[str] | RecordFile | None = None,
) -> Any:
    """Build the pass that takes the place of TVM's default Relax pipeline.

    Weights are found where they are constants of a Relax function. Parameters that are free stay
    inputs, and their layers dense: bind them first (`relax.transform.BindParams`; TVM's own
    `relax.build(..., params=...)` does not), or use `tvm_sparse.build(mod, target, params)`. Layers
    are decided by tuning records, and by the cost model where there are none. The target is the one
    in scope, as for every TVM pipeline. A function that cannot be rewritten, for example because it
    has side effects, and what stands in branches, stays dense, with a Python warning that says why.

    Parameters
    ----------
    threads, force, forbid, records
        As for `tvm_sparse.plan`.
    """
    import tvm
    import tvm.relax

    from .compiler import open_records

    file = open_records(records)

    @tvm.transform.module_pass(opt_level=0, name="tvm_sparse.Pipeline")
    def run(mod: Any, _context: Any) -> Any:
        from .pipeline import late_passes
        from .targets import machine_of

        target = tvm.target.Target.current(allow_none=False)
        rewriter = _Rewriter(target, threads, force or {}, forbid, file)
        # The front end reads functions without functions inside, and so does TVM's own pipeline.
        mod = tvm.relax.transform.LambdaLift()(mod)
        for name in _entry_functions(mod):
            mod = rewriter.rewrite(mod, name)
        rewriter.finish()
        return late_passes(machine_of(target, threads), target)(mod)

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


class _Rewriter:
    """Rewrites the functions of one module, and remembers which patterns fitted a layer."""

    def __init__(
        self,
        target: Any,
        threads: int | None,
        force: Mapping[str, str],
        forbid: Sequence[str],
        records: RecordFile | None,
    ) -> None:
        self.target, self.threads, self.records = target, threads, records
        self.force, self.forbid = force, forbid
        self._layers: list[str] = []

    def rewrite(self, mod: Any, name: str) -> Any:
        """Put kernels into one function, or say why it stays dense."""
        from .errors import ModelError
        from .frontends.loading import load

        try:
            model = load(_as_main(mod, name))
        except ModelError as error:
            warnings.warn(f"tvm_sparse leaves '{name}' dense: {error}", stacklevel=2)
            return mod
        # Here is no report that they could stand in.
        for note in model.notes:
            warnings.warn(f"tvm_sparse, in '{name}': {note}", stacklevel=2)
        return _back_to(self._lower(model), name)

    def finish(self) -> None:
        """Refuse patterns that fitted no layer of any function."""
        from .planner import check_patterns

        check_patterns([*self.force, *self.forbid], self._layers)

    def _lower(self, model: Any) -> Any:
        from .compiler import plan
        from .passes.collect_weights import collect_weights
        from .pipeline import lower_model
        from .planner import fits
        from .targets import machine_of

        sites = collect_weights(model)
        layers = [fused.site.name for fused in sites]
        self._layers += layers
        decided = plan(
            model,
            self.target,
            self.records,
            threads=self.threads,
            force={key: value for key, value in self.force.items() if fits(key, layers)},
            forbid=[pattern for pattern in self.forbid if fits(pattern, layers)],
        )
        return lower_model(model, sites, decided, machine_of(self.target, self.threads)).mod


def _as_main(mod: Any, name: str) -> Any:
    """Call a function `main`, as the front end wants it; another `main` gets out of its way."""
    import tvm

    from .passes.rename_functions import rename_functions

    if name != "main":
        mod = rename_functions(mod, {name: "main", "main": _ASIDE})
    function = mod["main"]
    # Parameters that are not bound are inputs here, whatever a front end said of them.
    for attribute in ("num_input", "params"):
        function = function.without_attr(attribute)
    functions = {
        known: function if known.name_hint == "main" else other
        for known, other in mod.functions_items()
    }
    return tvm.IRModule(functions, attrs=mod.attrs, global_infos=mod.global_infos)


def _back_to(mod: Any, name: str) -> Any:
    """Undo `_as_main`."""
    from .passes.rename_functions import rename_functions

    if name == "main":
        return mod
    return rename_functions(mod, {"main": name, _ASIDE: "main"})
