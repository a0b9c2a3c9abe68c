"""Features of several values in panels one below the other: every value's rows are contiguous."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as B

from ...panels import Panels, Source
from ...targets import X86Machine
from ...workload import Epilogue
from ..vectors import Vectors
from .cost import elementwise_us
from .dense_kernel import dense_kernel, outer_loop
from .packed_panel import write_zeros
from .panel_kernel import emit_tile


def concat_panels(
    panels: Panels,
    widths: tuple[int, ...],
    sources: tuple[Source, ...],
    machine: X86Machine,
) -> tirx.PrimFunc:
    """Build the concatenation along features.

    Parameters
    ----------
    panels : Panels
        How the tokens are cut.
    widths : tuple of int
        How many features each source gives.
    sources : tuple of Source
        Where they lie; several may lie in one argument.
    machine : X86Machine
        Gives threads.

    Returns
    -------
    PrimFunc
        Parameters (the arguments, y): float32, flat panels.
    """
    result: list[Any] = []
    features = sum(widths)
    held = {source.argument: source.features for source in sources}
    with dense_kernel("concat_panels", result) as kernel:
        inputs = [kernel.tensor(f"x{i}", [panels.size(held[i])]) for i in sorted(held)]
        y = kernel.tensor("y", [panels.size(features)])
        v = Vectors(panels.lanes)

        def panel(first: Any, nt: int) -> None:
            width, below = nt * v.lanes, first * (features + 1)
            for source, count in zip(sources, widths, strict=True):
                above = first * (source.features + 1) + source.first * width
                with B.serial(0, count * nt) as vector:
                    value = v.load(inputs[source.argument].flat, above + vector * v.lanes)
                    v.store(y.flat, value, below + vector * v.lanes)
                below = below + count * width
            write_zeros(v, y.flat, below, nt)

        work = elementwise_us(Epilogue(), panels.columns * features, machine)
        with kernel.body(), outer_loop(panels.tiles.total, work, machine.threads) as index:
            emit_tile(panels.tiles, panels.lanes, index, panel)
    return result[0]
