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
from .formats import FORMATS, PackedWeight
from .model import Model
from .passes.collect_weights import FusedSite
from .passes.lower_dense_ops import LowerDenseOps
from .passes.rewrite_weights import KernelCall, rewrite_weights
from .passes.schedule_rest import ScheduleRest
from .planner import Decision, Plan, check_config
from .progress import Progress
from .schedules.base import matrix_view
from .schedules.lookup import template_named
from .targets import X86Machine


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
    calls : mapping of str to KernelCall
        By the binding of each rewritten site.
    """

    mod: Any
    kernels: Mapping[str, tuple[str, ...]]
    packed_bytes: Mapping[str, int]
    calls: Mapping[str, KernelCall] = field(repr=False)


def lower_model(
    model: Model,
    sites: Sequence[FusedSite],
    plan: Plan,
    machine: X86Machine,
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
    calls: dict[str, KernelCall] = {}
    layers: dict[str, list[str]] = defaultdict(list)
    packed_bytes: dict[str, int] = {}
    known = {fused_site.site.name for fused_site in sites}
    for name in [d.name for d in plan.decisions if d.name not in known]:
        raise PlanError(f"the plan has a layer '{name}', which this model lacks")
    with progress.phase("pack weights", total=len(sites)) as phase:
        for fused_site in sites:
            decision = plan.decision(fused_site.site.name)
            phase.step(decision.name)
            if decision.kernel == "tvm":
                continue
            if fused_site.site.refusal:
                raise PlanError(
                    f"layer '{decision.name}' cannot run on '{decision.kernel}': "
                    f"{fused_site.site.refusal}"
                )
            weight = model.params[fused_site.site.param]
            packed, call = builder.build(fused_site, decision, weight)
            calls[fused_site.site.binding] = call
            layers[call.symbol].append(decision.name)
            packed_bytes[decision.name] = packed.nbytes
    mod = rewrite_weights(model, sites, calls)
    mod = bind_parameters(mod, model)
    kernels = {symbol: tuple(names) for symbol, names in layers.items()}
    return Lowered(mod, kernels, packed_bytes, calls)


def bind_parameters(mod: Any, model: Model) -> Any:
    """Make constants of the weights that are still parameters of `main`."""
    names = [variable.name for variable in mod["main"].params[len(model.inputs) :]]
    mod = relax.transform.BindParams("main", {name: model.params[name] for name in names})(mod)
    return relax.transform.DeadCodeElimination()(mod)


def late_passes(machine: X86Machine, target: Any) -> Any:
    """Return TVM's pipeline for the host with our kernels and schedules for what stays dense."""
    from tvm.relax.backend.cpu_generic import pipeline as stock

    return tvm.transform.Sequential(
        [
            LowerDenseOps(machine),
            *stock.library_dispatch_passes(target),
            relax.transform.LegalizeOps(),
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

    def __init__(self, machine: X86Machine, taken: Collection[str]) -> None:
        self.machine = machine
        self._functions: dict[Any, tuple[str, Any]] = {}
        self._symbols = set(taken)

    def build(
        self, fused_site: FusedSite, decision: Decision, weight: np.ndarray
    ) -> tuple[PackedWeight, KernelCall]:
        """Pack one weight and find or build its function."""
        workload = fused_site.site.workload
        template = template_named(decision.kernel)
        match = template.supports(workload, self.machine)
        if not match:
            raise PlanError(
                f"layer '{decision.name}' cannot run on '{decision.kernel}': {match.reason}"
            )
        check_config(decision.name, template, workload, self.machine, decision.config)
        view = matrix_view(weight, workload.op)
        weight_format = FORMATS[template.format]
        try:
            holds = weight_format.supports(view, decision.config)
            if not holds:
                raise PlanError(f"layer '{decision.name}' cannot be packed: {holds.reason}")
            packed = weight_format.pack(view, decision.config)
            key = (template.name, workload, _freeze(decision.config), _freeze(packed.config))
            if key not in self._functions:
                self._functions[key] = (
                    self._new_symbol(workload.op, template.format),
                    template.build(workload, self.machine, packed, decision.config),
                )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"layer '{decision.name}': kernel '{decision.kernel}' cannot be built with "
                f"{_shortened(decision.config)}: {error}"
            ) from error
        symbol, function = self._functions[key]
        return packed, KernelCall(symbol, function, template.arguments(workload, packed))

    def _new_symbol(self, op: str, weight_format: str) -> str:
        names = (f"{weight_format}_{op}_{number}" for number in itertools.count(1))
        symbol = next(name for name in names if name not in self._symbols)
        self._symbols.add(symbol)
        return symbol


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
