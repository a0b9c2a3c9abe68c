"""Our own kernels as systems to time: built from the templates, checked, searched and planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import tvm
from bars import zeros
from cases import Case
from timing import System, fastest
from truth import Truth
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as B
from tvm_sparse.schedules.base import KernelTemplate
from tvm_sparse.schedules.lookup import DENSE_FORMATS, template_named
from tvm_sparse.schedules.x86.templates import TEMPLATES, narrowed

from tvm_sparse.calibration import calibrated
from tvm_sparse.formats import FORMATS, PackedWeight
from tvm_sparse.ops import WeightSite
from tvm_sparse.panels import Panels
from tvm_sparse.planner import decide
from tvm_sparse.profile import profile_weight
from tvm_sparse.targets import machine_of, resolve_target
from tvm_sparse.workload import MatmulGeometry, Workload

# Whether kernels exist that take and give activations in panels.
HAS_PANELS = any(field.name == "layout" for field in fields(MatmulGeometry))


@dataclass(frozen=True)
class Choice:
    """A template at a configuration."""

    template: str
    config: Mapping[str, Any]

    @property
    def is_dense(self) -> bool:
        """Whether it multiplies by zeros."""
        return template_named(self.template).format in DENSE_FORMATS

    @property
    def key(self) -> tuple[str, str]:
        """What two equal choices share."""
        return self.template, repr(sorted(self.config.items()))

    def __str__(self) -> str:
        shown = {k: v for k, v in self.config.items() if k not in ("multiple", "groups")}
        if shown.get("threads") == 1:
            shown = {k: v for k, v in shown.items() if k not in ("threads", "parts")}
        return " ".join([self.template, *(f"{k}={v}" for k, v in shown.items())])


@dataclass
class Kernel:
    """A compiled kernel with one weight and its activations."""

    choice: Choice
    call: partial[None]
    nothing: partial[None]
    buffers: list[np.ndarray]
    packed_bytes: int
    output: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes
    ----------
    best, dense : Choice
        The fastest kernel of all, and of those that multiply by zeros.
    packed_bytes : int
        What the weight takes in the fastest kernel that skips zeros.
    """

    best: Choice
    dense: Choice | None
    packed_bytes: int


@dataclass
class Layer:
    """One case with one weight, in one form: row-major around, or the kernel between panels."""

    case: Case
    weight: np.ndarray
    workload: Workload
    x: np.ndarray

    @property
    def matrix(self) -> np.ndarray:
        """The weight as formats pack it."""
        return self.weight.reshape(len(self.weight), -1)

    @property
    def in_panels(self) -> bool:
        """Whether activations lie in panels before and after the kernel."""
        return getattr(self.workload.geometry, "layout", "") == "panels"


def layer_of(case: Case, weight: np.ndarray, x: np.ndarray, threads: int = 1) -> Layer:
    """Return the layer that stands alone."""
    return Layer(case, weight, case.workload(threads), x)


def between_panels(layer: Layer) -> Layer:
    """Return the kernel alone."""
    geometry = replace(layer.workload.geometry, layout="panels")
    return replace(layer, workload=replace(layer.workload, geometry=geometry))


@dataclass
class Shop:
    """Builds kernels for one target, and compiles none of them twice."""

    target_name: str
    threads: int
    _compiled: dict[Any, Any] = field(default_factory=dict)
    _dense_times: dict[Any, tuple[float, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.target = resolve_target(self.target_name)
        self.machine = calibrated(machine_of(self.target, self.threads), self.target)

    def choices(self, layer: Layer) -> Iterator[Choice]:
        """List every configuration of every template that takes the layer."""
        for template in TEMPLATES:
            if template.takes(layer.workload, self.machine):
                for config in template.space(layer.workload, self.machine):
                    yield Choice(template.name, config)

    def planned(self, layer: Layer) -> Choice:
        """Ask the cost model, as a plan does."""
        site = WeightSite("layer", "weight", "output", layer.workload, layer.weight.shape)
        decision = decide(site, profile_weight(layer.matrix), self.machine)
        return Choice(decision.kernel, decision.config)

    def build(
        self,
        layer: Layer,
        choice: Choice,
        packed: PackedWeight | None = None,
        like: Kernel | None = None,
    ) -> Kernel:
        """Pack the weight, compile unless that was done, and bind the arguments.

        `like` is a kernel of the same choice whose activations this one works on.
        """
        template = template_named(choice.template)
        packed = packed or FORMATS[template.format].pack(layer.matrix, choice.config)
        function, shapes = self._function(template, layer.workload, packed, choice.config)
        arrays = [np.asarray(a) for a in template.arguments(layer.workload, packed)]
        panels = self._panels(layer, choice)
        ends = like.call.args if like else map(_tensor, _activations(layer, panels, shapes[1]))
        x, *_, y = ends
        tensors = [x, *map(_tensor, arrays), y]
        views = [np.from_dlpack(tensor) for tensor in tensors]
        empty = _empty_kernel(tuple((a.shape, str(a.dtype)) for a in views), str(self.target))

        def output() -> np.ndarray:
            result = views[-1]
            return result if panels is None else panels.unpack(result, len(layer.weight))

        return Kernel(
            choice,
            partial(function, *tensors),
            partial(empty, *tensors),
            views,
            sum(a.nbytes for a in arrays),
            output,
        )

    def _panels(self, layer: Layer, choice: Choice) -> Panels | None:
        """Say how a kernel that takes panels cuts its tokens."""
        if not layer.in_panels:
            return None
        # Few tokens take narrower vectors in one of the templates.
        sliced = template_named(choice.template).format == "sliced_ell"
        machine = narrowed(layer.workload, self.machine) if sliced else self.machine
        return Panels(layer.case.columns, int(choice.config["nt"]), machine.lanes)

    def _function(
        self, template: KernelTemplate, workload: Workload, packed: PackedWeight, config: Any
    ) -> Any:
        key = (template.name, workload, repr(sorted(config.items())), repr(packed.config))
        if key not in self._compiled:
            function = template.build(workload, self.machine, packed, config)
            function = function.with_attr("global_symbol", "kernel")
            ends = function.params[0], function.params[-1]
            shapes = [tuple(map(int, end.ty.shape)) for end in ends]
            self._compiled[key] = tvm.compile(function, self.target)["kernel"], shapes
        return self._compiled[key]

    def search(self, layer: Layer, truth: Truth) -> Found:
        """Check and time everything; name the fastest kernels.

        Dense kernels are timed once a case: their time does not depend on the weight.
        """
        times: dict[str, list[tuple[float, int, Choice]]] = {"dense": [], "sparse": []}
        packs: dict[Any, PackedWeight] = {}
        for choice in self.choices(layer):
            known = (layer.workload, choice.key)
            if known in self._dense_times:
                times["dense"].append((*self._dense_times[known], choice))
                continue
            name = template_named(choice.template).format
            form = (name, repr(sorted(choice.config.items())))
            if form not in packs:
                packs[form] = FORMATS[name].pack(layer.matrix, choice.config)
            kernel = self.build(layer, choice, packs[form])
            kernel.call()
            truth.check(str(choice), kernel.output())
            time = fastest(System([kernel.call], kernel.nothing)), kernel.packed_bytes
            times["dense" if choice.is_dense else "sparse"].append((*time, choice))
            if choice.is_dense:
                self._dense_times[known] = time
        dense, sparse = (min(entries, key=_time, default=None) for entries in times.values())
        best = min(filter(None, (dense, sparse)), key=_time)
        return Found(best[2], dense[2] if dense else None, (sparse or best)[1])

    def system(self, layer: Layer, choice: Choice, truth: Truth, copies: int) -> System:
        """Return a system with `copies` permuted weights in rotation; of a dense kernel, one."""
        first = self.build(layer, choice)
        first.call()
        truth.check(str(choice), first.output())
        seeds = range(0 if choice.is_dense else copies - 1)
        others = [self.build(permuted(layer, seed), choice, like=first) for seed in seeds]
        return System([k.call for k in (first, *others)], first.nothing, first.buffers)


def _activations(
    layer: Layer, panels: Panels | None, y_shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the input as the kernel wants it, and room for its output."""
    if panels is None:
        return layer.x, zeros(y_shape)
    packed = panels.pack(layer.x)
    x = zeros(packed.shape)
    x[...] = packed
    return x, zeros(y_shape)


def _time(entry: tuple[float, int, Choice]) -> float:
    return entry[0]


def _tensor(array: np.ndarray) -> Any:
    return tvm.runtime.tensor(array)


def permuted(layer: Layer, seed: int) -> Layer:
    """Shuffle the weight's rows and columns: the same work in other loops."""
    return replace(layer, weight=shuffled(layer.weight, seed))


def shuffled(weight: np.ndarray, seed: int) -> np.ndarray:
    """Shuffle the outputs and inputs of a weight."""
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(weight.shape[0]), rng.permutation(weight.shape[1])
    return np.ascontiguousarray(weight[rows][:, columns])


@lru_cache
def _empty_kernel(arguments: tuple[tuple[tuple[int, ...], str], ...], target: str) -> Any:
    """Compile a function that takes the same arguments and returns: what a call costs."""
    with IRBuilder() as builder:
        with B.prim_func():
            B.func_name("empty")
            B.func_attr({"global_symbol": "empty", "tirx.noalias": True})
            for index, (shape, dtype) in enumerate(arguments):
                B.arg(f"a{index}", B.Buffer(shape, dtype))
            B.evaluate(0)
    return tvm.compile(builder.get(), resolve_target("native"))["empty"]
