"""Rotary embeddings on activations in panels: each feature meets its partner half a head away."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as B

from ...panels import Panels, Source
from ...targets import X86Machine
from ..vectors import Vectors
from .dense_kernel import dense_kernel, outer_loop
from .packed_panel import write_zeros
from .panel_kernel import emit_tile

_NANOSECONDS_PER_VECTOR = 1.0


def rotary_panels(
    panels: Panels, heads: int, depth: int, source: Source, machine: X86Machine
) -> tirx.PrimFunc:
    """Build x * cos + rotate_half(x) * sin, where rotate_half([a, b]) is [-b, a] of each head.

    Parameters
    ----------
    panels : Panels
        How the tokens are cut.
    heads, depth : int
        Heads, and the features of each: an even number.
    source : Source
        Where x lies in the first argument.
    machine : X86Machine
        Gives threads.

    Returns
    -------
    PrimFunc
        Parameters (x, cos, sin, y): float32, flat panels; cos and sin of `depth` features.
    """
    result: list[Any] = []
    features = heads * depth
    with dense_kernel("rotary_panels", result) as kernel:
        x = kernel.tensor("x", [panels.size(source.features)])
        cos = kernel.tensor("cos", [panels.size(depth)])
        sin = kernel.tensor("sin", [panels.size(depth)])
        y = kernel.tensor("y", [panels.size(features)])
        v, half = Vectors(panels.lanes), depth // 2

        def panel(first: Any, nt: int) -> None:
            def turn(head: Any, pair: Any, j: int) -> None:
                low = v.keep(v.load(x.flat, given_at(head, pair, j)))
                high = v.keep(v.load(x.flat, given_at(head, pair + half, j)))
                for row, straight, turned in ((pair, low, -high), (pair + half, high, low)):
                    angle = first * (depth + 1) + (row * nt + j) * v.lanes
                    total = straight * v.load(cos.flat, angle) + turned * v.load(sin.flat, angle)
                    v.store(y.flat, total, base + ((head * depth + row) * nt + j) * v.lanes)

            def given_at(head: Any, row: Any, j: int) -> Any:
                given = (source.first + head * depth + row) * nt + j
                return first * (source.features + 1) + given * v.lanes

            base = first * (features + 1)
            with B.serial(0, heads) as head, B.serial(0, half) as pair:
                for j in range(nt):
                    turn(head, pair, j)
            write_zeros(v, y.flat, base + features * nt * v.lanes, nt)

        work = panels.columns * features / panels.lanes * _NANOSECONDS_PER_VECTOR / 1e3
        with kernel.body(), outer_loop(panels.tiles.total, work, machine.threads) as index:
            emit_tile(panels.tiles, panels.lanes, index, panel)
    return result[0]
