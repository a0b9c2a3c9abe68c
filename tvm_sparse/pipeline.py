"""The phases from a planned model to code: the table of contents of this compiler."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax

from .errors import PlanError
from .formats import FORMATS, PackedOrder
from .layout import Task, check_decision, lay_out, together, workload_of
from .model import Model
from .passes.collect_weights import FusedSite
from .passes.lower_dense_ops import LowerDenseOps
from .passes.rewrite_weights import KernelCall, rewrite_weights
from .passes.schedule_rest import ScheduleRest
from .passes.vectorize_math import LEGALIZATIONS
from .planner import Plan
from .progress import Progress
from .schedules.base import matrix_view
from .schedules.lookup import template_named
from .targets import CudaMachine, Machine, X86Machine


@dataclass(frozen=True)
class Lowered:
    """A model whose weights went into kernels.

    Attributes
    ----------
    mod : tvm.IRModule
        Ready for `tvm.compile` with `late_passes`.
    kernels : mapping of str to tuple of str
        Layer names by kernel symbol, in calling order.
    packed_bytes : mapping of str to int
        Bytes of each layer's packed weight.
    orders : mapping of str to PackedOrder
        Where rows and columns of each layer's packed weight went, or of the weight that it was
        packed in with others; without layers whose rows and columns are where they were.
    calls : mapping of str to KernelCall
        By the binding of each rewritten site.
    """

    mod: Any
    kernels: Mapping[str, tuple[str, ...]]
    packed_bytes: Mapping[str, int]
    orders: Mapping[str, PackedOrder] = field(repr=False)
    calls: Mapping[str, KernelCall] = field(repr=False)


def lower_model(
    model: Model,
    sites: Sequence[FusedSite],
    plan: Plan,
    machine: Machine,
    progress: Progress | None = None,
) -> Lowered:
    """Pack the weights as planned and put their kernels in the place of the operators.

    Raises
    ------
    PlanError
        When the plan names another model's layers or a configuration that cannot be built.
    """
    progress = progress or Progress()
    builder = _KernelBuilder(machine, [name.name_hint for name in model.mod.get_global_vars()])
    layers: dict[str, list[str]] = defaultdict(list)
    packed_bytes: dict[str, int] = {}
    orders: dict[str, PackedOrder] = {}
    known = {fused_site.site.name for fused_site in sites}
    for name in [d.name for d in plan.decisions if d.name not in known]:
        raise PlanError(f"the plan has a layer '{name}', which this model lacks")
    tasks = []
    for fused_site in sites:
        decision = plan.decision(fused_site.site.name)
        if decision.kernel != "tvm":
            check_decision(fused_site.site, decision, machine)
            tasks.append(Task(fused_site, decision.kernel, decision.config))
    layout, tasks = lay_out(model, sites, tasks, machine)
    calls: dict[str, KernelCall] = {}
    with progress.phase("pack weights", total=len(sites)) as phase:
        for group in together(layout, tasks):
            for task in group:
                phase.step(task.site.name)
            built, order = builder.build(model, group)
            for task, (call, nbytes) in zip(group, built, strict=True):
                calls[task.site.binding] = call
                layers[call.symbol].append(task.site.name)
                packed_bytes[task.site.name] = nbytes
                if order is not None:
                    orders[task.site.name] = order
    mod = rewrite_weights(model, sites, calls, layout, machine)
    mod = bind_parameters(mod, model)
    kernels = {symbol: tuple(names) for symbol, names in layers.items()}
    return Lowered(mod, kernels, packed_bytes, orders, calls)


def bind_parameters(mod: Any, model: Model) -> Any:
    """Make constants of the weights that are still parameters of `main`."""
    names = [variable.name for variable in mod["main"].params[len(model.inputs) :]]
    mod = relax.transform.BindParams("main", {name: model.params[name] for name in names})(mod)
    return relax.transform.DeadCodeElimination()(mod)


def late_passes(machine: Machine, target: Any) -> Any:
    """Return TVM's pipeline for the target with our kernels and schedules for what stays dense."""
    if isinstance(machine, CudaMachine):
        return _cuda_passes(target)
    return _x86_passes(machine, target)


def _cuda_passes(target: Any) -> Any:
    """Return TVM's pipeline for GPUs; dlight's schedules serve what has no kernel of ours."""
    from tvm.relax.backend.cuda import pipeline as stock

    passes = (
        stock.library_dispatch_passes,
        stock.legalize_passes,
        stock.dataflow_lower_passes,
        stock.finalize_passes,
    )

    @tvm.transform.module_pass(opt_level=0, name="CudaPipeline")
    def run(mod: Any, _context: Any) -> Any:
        with target:
            return tvm.transform.Sequential([p for part in passes for p in part(target)])(mod)

    return run


def _x86_passes(machine: X86Machine, target: Any) -> Any:
    from tvm.relax.backend.cpu_generic import pipeline as stock

    return tvm.transform.Sequential(
        [
            LowerDenseOps(machine),
            *stock.library_dispatch_passes(target),
            relax.transform.LegalizeOps(LEGALIZATIONS),
            # Before fusion: a reshape is a view, until it is fused with another one and copies.
            relax.transform.RewriteDataflowReshape(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            ScheduleRest(machine),
            relax.transform.DeadCodeElimination(),
            *stock.dataflow_lower_passes(target),
            *stock.finalize_passes(target),
        ]
    )


class _KernelBuilder:
    """Packs weights and builds kernels, one function for all layers that need the same."""

    def __init__(self, machine: Machine, taken: Collection[str]) -> None:
        self.machine = machine
        self._functions: dict[Any, tuple[str, Any]] = {}
        self._symbols = set(taken)

    def build(
        self, model: Model, group: Sequence[Task]
    ) -> tuple[list[tuple[KernelCall, int]], PackedOrder | None]:
        """Pack the weights of some layers as one, and find or build its function.

        Returns the call of each layer with its share of the packed bytes, and the packed order.
        """
        task, names = group[0], [task.site.name for task in group]
        views = [matrix_view(model.params[t.site.param], t.site.workload.op) for t in group]
        view = views[0] if len(views) == 1 else np.concatenate(views)
        workload, config = workload_of(group), dict(task.config)
        template = template_named(task.kernel)
        weight_format = FORMATS[template.format]
        try:
            holds = weight_format.supports(view, config)
            if not holds:
                raise PlanError(f"layer '{names[0]}' cannot be packed: {holds.reason}")
            packed = weight_format.pack(view, config)
            key = (template.name, workload, len(group), _freeze(config), _freeze(packed.config))
            if key not in self._functions:
                self._functions[key] = (
                    self._new_symbol(workload.op, template.format, len(group)),
                    template.build(workload, self.machine, packed, config),
                )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"layer '{names[0]}': kernel '{task.kernel}' cannot be built with "
                f"{_shortened(config)}: {error}"
            ) from error
        symbol, function = self._functions[key]
        bindings = tuple(t.site.binding for t in group)
        channels = _channels(model, group)
        arrays = template.arguments(workload, packed)
        calls, first = [], 0
        for part, nbytes in zip(views, _shares(packed.nbytes, views), strict=True):
            call = KernelCall(
                symbol,
                function,
                arrays,
                channels,
                task.panels,
                len(view),
                first,
                bindings,
                template.on_tensor_cores,
            )
            calls.append((call, nbytes))
            first += len(part)
        return calls, weight_format.order(packed)

    def _new_symbol(self, op: str, weight_format: str, layers: int) -> str:
        kind = f"{weight_format}_{op}" + (f"_of_{layers}" if layers > 1 else "")
        names = (f"{kind}_{number}" for number in itertools.count(1))
        symbol = next(name for name in names if name not in self._symbols)
        self._symbols.add(symbol)
        return symbol


def _shares(nbytes: int, parts: Sequence[np.ndarray]) -> list[int]:
    """Share the bytes of a packed weight out among its parts, by their nonzeros."""
    if len(parts) == 1:
        return [nbytes]
    counts = [int(np.count_nonzero(part)) for part in parts]
    return [nbytes * count // max(1, sum(counts)) for count in counts]


def _channels(model: Model, group: Sequence[Task]) -> list[np.ndarray]:
    """Return the vectors of an epilogue; those of layers that are one follow each other."""
    vectors = zip(*(task.fused_site.fused.channels for task in group), strict=True)
    return [np.concatenate([model.params[name].reshape(-1) for name in names]) for names in vectors]


def _shortened(config: Mapping[str, Any]) -> dict[str, Any]:
    """Cut long values: a schedule's steps fill pages."""
    return {
        key: f"{value[:30]}..." if isinstance(value, str) and len(value) > 40 else value
        for key, value in config.items()
    }


def _freeze(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(
        sorted((k, tuple(v) if isinstance(v, (list, tuple)) else v) for k, v in config.items())
    )
