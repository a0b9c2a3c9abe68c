"""Times of single kernels, as the cost model is fitted to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..formats import FORMATS
from ..schedules.base import Config, KernelTemplate
from ..targets import X86Machine
from ..workload import Conv2dGeometry, MatmulGeometry, Workload

# Distinct weights in rotation: other loop lengths every time.
ROTATION = 8
# Copies of them until they are together that many times as large as L2: weights of a network come
# from beyond it.
_BEYOND_L2 = 2
_MOST_COPIES = 32
# A kernel is called on every weight this often at least, and until it took that much of the core.
_ROUNDS = 5
_SECONDS = 0.04


@dataclass(frozen=True)
class KernelTimer:
    """One compiled kernel, to be timed on many weights of one shape.

    Attributes
    ----------
    template, workload, config
        What was compiled.
    kernel : callable
        Takes the activations, the arrays of a packed weight, and room for the result.
    x, y : tvm.runtime.Tensor
        Activations, and room for the result.
    l2_bytes : int
        What weights are to come from beyond.
    call_us : float
        Microseconds of a call that does nothing.
    """

    template: KernelTemplate
    workload: Workload
    config: Config
    kernel: Callable[..., Any]
    x: Any
    y: Any
    l2_bytes: int
    call_us: float

    def microseconds(self, weights: Sequence[np.ndarray]) -> float:
        """Time a call of the kernel, on one weight after the other, as in a network.

        A weight that is called again and again has its loops learned by heart and its bytes in L1.
        What counts is the time on the core, since a busy machine lets others run between, and of
        each weight the lower quartile, since what others leave in the caches only ever slows down.

        Parameters
        ----------
        weights : sequence of numpy.ndarray
            Matrices as formats pack them, all of the shape that the kernel was built for.
        """
        packs = [FORMATS[self.template.format].pack(weight, self.config) for weight in weights]
        arrays = [self.template.arguments(self.workload, packed) for packed in packs]
        size = sum(array.nbytes for own in arrays for array in own)
        copies = min(_MOST_COPIES, -(-_BEYOND_L2 * self.l2_bytes // max(size, 1)))
        calls = [(self.x, *map(_copied, own), self.y) for _ in range(copies) for own in arrays]
        rounds = timed_rounds(self.kernel, calls)
        lower = np.quantile(rounds, 0.25, axis=0)
        return max(float(lower.mean()) * 1e6 - self.call_us, 0.01)

    def fastest_seconds(self, rounds: int) -> float:
        """Time calls on a weight of ones: the fastest is the core's, others shared it."""
        geometry = self.workload.geometry
        assert geometry is not None
        weight = np.ones(geometry.weight_shape, np.float32)
        packed = FORMATS[self.template.format].pack(weight, self.config)
        arrays = self.template.arguments(self.workload, packed)
        call = (self.x, *map(_copied, arrays), self.y)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            self.kernel(*call)
            times.append(time.perf_counter() - start)
        return min(times)


def build_timer(
    template: KernelTemplate,
    workload: Workload,
    machine: X86Machine,
    target: Any,
    config: Config,
    call_us: float = 0.0,
) -> KernelTimer:
    """Compile a kernel for timing."""
    import tvm

    geometry = workload.geometry
    assert geometry is not None
    # A kernel is the same for every weight of its shape.
    any_weight = np.ones(geometry.weight_shape, np.float32)
    packed = FORMATS[template.format].pack(any_weight, config)
    function = template.build(workload, machine, packed, config)
    kernel = tvm.compile(function.with_attr("global_symbol", "kernel"), target)["kernel"]
    x_shape, y_shape = _activations(geometry)
    x = np.random.default_rng(1).standard_normal(x_shape, np.float32)
    y = np.zeros(y_shape, np.float32)
    return KernelTimer(
        template, workload, config, kernel, _copied(x), _copied(y), machine.l2_bytes, call_us
    )


def timed_rounds(kernel: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> np.ndarray:
    """Call with each tuple of arguments in turn, until enough; return seconds [rounds, calls]."""
    for call in calls:
        kernel(*call)
    rounds: list[list[float]] = []
    spent = 0.0
    while len(rounds) < _ROUNDS or spent < _SECONDS:
        taken = []
        for call in calls:
            start = time.thread_time()
            kernel(*call)
            taken.append(time.thread_time() - start)
        rounds.append(taken)
        spent += sum(taken)
    return np.array(rounds)


def shuffled(weight: np.ndarray, count: int = ROTATION) -> list[np.ndarray]:
    """Permute rows and columns of a matrix, again and again: the same work in other loops."""
    rng = np.random.default_rng(1)
    rows, columns = weight.shape
    return [
        np.ascontiguousarray(weight[rng.permutation(rows)][:, rng.permutation(columns)])
        for _ in range(count)
    ]


def _copied(array: np.ndarray) -> Any:
    import tvm

    return tvm.runtime.tensor(array)


def _activations(geometry: MatmulGeometry | Conv2dGeometry) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of input and output; symbolic sizes have no time."""
    g = geometry
    if isinstance(g, MatmulGeometry):
        assert g.n is not None and g.layout == "rows"
        return (g.n, g.k), (g.n, g.m)
    assert g.batch is not None
    return (
        (g.batch, g.in_channels, g.in_height, g.in_width),
        (g.batch, g.out_channels, g.out_height, g.out_width),
    )
