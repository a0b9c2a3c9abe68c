"""Normalisation of activations in panels: down the columns of vectors, nothing horizontal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...panels import Panels
from ...targets import X86Machine
from ..vectors import Vectors
from .dense_kernel import Tensor, dense_kernel, outer_loop
from .packed_panel import write_zeros
from .panel_kernel import emit_tile

_NANOSECONDS_PER_VECTOR = 2.0
# Independent sums: they hide the latency of an addition.
_SUMS = 4


def layer_norm_panels(
    panels: Panels,
    features: int,
    machine: X86Machine,
    epsilon: float = 1e-5,
    gamma: bool = True,
    beta: bool = True,
    centred: bool = True,
) -> tirx.PrimFunc:
    """Build (x - mean) / sqrt(variance + epsilon) * gamma + beta over the features of each token.

    The variance is the mean square of the differences from the mean, in a second pass, as in
    `layer_norm`.

    Parameters
    ----------
    panels : Panels
        How the tokens are cut.
    features : int
        Of one token.
    machine : X86Machine
        Gives threads.
    epsilon : float
        Added to the variance.
    gamma, beta : bool
        Whether there is a factor and a summand, each [features].
    centred : bool
        Whether the mean is subtracted; without that it is root-mean-square normalisation.

    Returns
    -------
    PrimFunc
        Parameters (x, gamma if any, beta if any, y), float32; x and y are flat panels.
    """
    result: list[Any] = []
    with dense_kernel("layer_norm_panels", result) as kernel:
        x = kernel.tensor("x", [panels.size(features)])
        scale = kernel.tensor("gamma", [features]) if gamma else None
        shift = kernel.tensor("beta", [features]) if beta else None
        y = kernel.tensor("y", [panels.size(features)])
        cost = panels.columns * features / panels.lanes * _NANOSECONDS_PER_VECTOR / 1e3
        with kernel.body(), outer_loop(panels.tiles.total, cost, machine.threads) as index:
            norm = _Norm(Vectors(panels.lanes), features, epsilon, x, scale, shift, y, centred)
            emit_tile(panels.tiles, panels.lanes, index, norm.panel)
    return result[0]


class _Norm:
    def __init__(
        self,
        vectors: Vectors,
        features: int,
        epsilon: float,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        y: Tensor,
        centred: bool,
    ) -> None:
        self.vectors, self.features, self.epsilon = vectors, features, epsilon
        self.x, self.scale, self.shift, self.y = x, scale, shift, y
        self.centred = centred

    def panel(self, first: Any, nt: int) -> None:
        """Normalise one panel."""
        v, features = self.vectors, self.features
        base = first * (features + 1)
        share = v.splat(T.float32(1.0 / features))

        def at(feature: Any, j: int) -> Any:
            return base + (feature * nt + j) * v.lanes

        def value(feature: Any, j: int) -> Any:
            return v.load(self.x.flat, at(feature, j))

        means = [v.keep(total * share) for total in self._sums(nt, value)] if self.centred else []

        def difference(feature: Any, j: int) -> Any:
            return value(feature, j) - means[j] if self.centred else value(feature, j)

        def square(feature: Any, j: int) -> Any:
            kept = v.keep(difference(feature, j))
            return kept * kept

        factors = []
        for total in self._sums(nt, square):
            root = T.sqrt(total * share + v.splat(T.float32(self.epsilon)))
            factors.append(v.keep(v.splat(T.float32(1.0)) / root))
        with B.serial(0, features) as feature:
            for j in range(nt):
                result = difference(feature, j) * factors[j]
                if self.scale is not None:
                    result = result * v.splat(self.scale.flat[feature])
                if self.shift is not None:
                    result = result + v.splat(self.shift.flat[feature])
                v.store(self.y.flat, result, at(feature, j))
        write_zeros(v, self.y.flat, at(features, 0), nt)

    def _sums(self, nt: int, term: Callable[[Any, int], Any]) -> list[Any]:
        """Add up over the features, for each of the panel's vectors; narrow panels in turns."""
        v, turns = self.vectors, max(1, _SUMS // nt)
        registers = [[v.register() for _ in range(nt)] for _ in range(turns)]
        for register in (register for turn in registers for register in turn):
            v.store(register, v.zero())

        def add(feature: Any, turn: int) -> None:
            for j, register in enumerate(registers[turn]):
                v.store(register, v.load(register) + term(feature, j))

        whole = self.features // turns
        with B.serial(0, whole) as step:
            for turn in range(turns):
                add(step * turns + turn, turn)
        for turn in range(self.features - whole * turns):
            add(whole * turns + turn, turn)
        totals = []
        for j in range(nt):
            total = v.load(registers[0][j])
            for turn in range(1, turns):
                total = total + v.load(registers[turn][j])
            totals.append(total)
        return totals
