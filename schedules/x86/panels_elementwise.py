"""Chains of elementwise operators on activations in panels: one pass over memory."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as B

from ...panels import Panels, Source
from ...targets import X86Machine
from ...workload import Epilogue
from ..epilogue import emit_epilogue
from ..vectors import Vectors
from .cost import elementwise_us
from .dense_kernel import dense_kernel, outer_loop
from .packed_panel import write_zeros
from .panel_kernel import emit_tile


def elementwise_panels(
    panels: Panels,
    features: int,
    chain: Epilogue,
    sources: tuple[Source, ...],
    machine: X86Machine,
) -> tirx.PrimFunc:
    """Build a chain.

    Parameters
    ----------
    panels : Panels
        How the tokens are cut.
    features : int
        Of one token of the result and of each operand.
    chain : Epilogue
        Its channels are numbers a feature; without operations it copies the first source, which is
        its `acc`.
    sources : tuple of Source
        Where the chain's tensors lie; several may lie in one argument.
    machine : X86Machine
        Gives threads.

    Returns
    -------
    PrimFunc
        Parameters (the arguments, the channels [features], y), float32; flat panels but for the
        channels.
    """
    result: list[Any] = []
    held = {source.argument: source.features for source in sources}
    with dense_kernel("elementwise_panels", result) as kernel:
        inputs = [kernel.tensor(f"x{i}", [panels.size(held[i])]) for i in sorted(held)]
        vectors = [kernel.tensor(f"channel{i}", [features]) for i in range(chain.channels)]
        y = kernel.tensor("y", [panels.size(features)])
        v = Vectors(panels.lanes)

        def panel(first: Any, nt: int) -> None:
            def source_at(source: Source, row: Any, j: int) -> Any:
                at = first * (source.features + 1) + ((source.first + row) * nt + j) * v.lanes
                return v.load(inputs[source.argument].flat, at)

            def store(row: Any, j: int) -> None:
                value = emit_epilogue(
                    chain,
                    source_at(sources[0], row, j),
                    lambda i: v.keep(v.splat(vectors[i].flat[row])),
                    lambda i: v.keep(source_at(sources[i], row, j)),
                    v.lanes,
                )
                v.store(y.flat, value, base + (row * nt + j) * v.lanes)

            base = first * (features + 1)
            with B.serial(0, features) as row:
                for j in range(nt):
                    store(row, j)
            write_zeros(v, y.flat, base + features * nt * v.lanes, nt)

        work = elementwise_us(chain, panels.columns * features, machine)
        with kernel.body(), outer_loop(panels.tiles.total, work, machine.threads) as index:
            emit_tile(panels.tiles, panels.lanes, index, panel)
    return result[0]
