"""Attention on activations in panels: no transposition, scores that stay in cache.

With features down and tokens across, S^T[t2][t1] = sum_d K[d][t2] Q[d][t1] broadcasts elements of K
over vectors of Q, softmax runs down the columns, and O[d][t1] = sum_t2 V[d][t2] P^T[t2][t1]
broadcasts elements of V. Scores exist for some vectors of queries of one head at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...panels import Panels, Source, split_evenly
from ...targets import X86Machine
from ..vectors import Vectors
from .batch_matmul import FLOPS_PER_MICROSECOND_AND_LANE
from .dense_kernel import Tensor, UnsupportedShapeError, dense_kernel, outer_loop
from .packed_panel import write_zeros
from .panel_kernel import emit_tile
from .register_tile import RegisterTile
from .vector_math import LOG2_E, exp2_nonpositive

# What is added to the scores: nothing; -inf where a key comes after its query; one number a key; or
# one a pair of key and query.
MaskKind = Literal["none", "causal", "keys", "pairs"]


@dataclass(frozen=True)
class AttentionGeometry:
    """softmax(scale * Q K^T + mask) V, head by head.

    Attributes
    ----------
    batch, tokens : int
        Sequences, and the tokens of each: queries, keys and values have as many.
    heads, kv_heads : int
        Heads of the queries; keys and values have as many or fewer, each for neighbouring heads.
    depth : int
        Features of a head.
    scale : float
        Factor of the scores.
    mask : MaskKind
    mask_batch, mask_heads : int
        Leading dimensions of a mask, each 1 or as many as there are.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    depth: int
    scale: float
    mask: MaskKind = "none"
    mask_batch: int = 1
    mask_heads: int = 1


def supports_panels(geometry: AttentionGeometry, lanes: int) -> bool:
    """Whether every sequence begins with a vector."""
    return geometry.batch == 1 or geometry.tokens % lanes == 0


def attention_panels(
    geometry: AttentionGeometry,
    panels: Panels,
    sources: tuple[Source, Source, Source],
    machine: X86Machine,
) -> tirx.PrimFunc:
    """Build attention of batch * tokens tokens.

    Parameters
    ----------
    geometry : AttentionGeometry
    panels : Panels
        How the tokens are cut.
    sources : tuple of Source
        Queries, keys and values; several may lie in one argument.
    machine : X86Machine
        Gives registers, the cache for scores, and threads.

    Returns
    -------
    PrimFunc
        Parameters (the arguments, a mask [batch or 1, heads or 1, keys, queries or 1] if any, y):
        float32, flat panels but for the mask.

    Raises
    ------
    UnsupportedShapeError
        When sequences begin within a vector.
    """
    g = geometry
    if not supports_panels(g, panels.lanes):
        raise UnsupportedShapeError(f"sequences of {g.tokens} tokens begin within a vector")
    result: list[Any] = []
    with dense_kernel("attention_panels", result) as kernel:
        sizes = {source.argument: source.features for source in sources}
        arguments = [
            kernel.tensor(f"x{number}", [panels.size(sizes[number])]) for number in sorted(sizes)
        ]
        mask = None
        if g.mask in ("keys", "pairs"):
            queries = g.tokens if g.mask == "pairs" else 1
            mask = kernel.tensor("mask", [g.mask_batch, g.mask_heads, g.tokens, queries])
        y = kernel.tensor("y", [panels.size(g.heads * g.depth)])
        macs = 2.0 * g.batch * g.heads * g.tokens * g.tokens * g.depth
        cost = 2.0 * macs / (FLOPS_PER_MICROSECOND_AND_LANE * panels.lanes)
        with kernel.body():
            emitter = _Attention(g, panels, machine, mask, y)
            with outer_loop(g.batch * g.heads, cost, machine.threads) as unit:
                emitter.head(unit, [(arguments[s.argument], s) for s in sources])
            emitter.zeros()
    return result[0]


class _Attention:
    def __init__(
        self,
        geometry: AttentionGeometry,
        panels: Panels,
        machine: X86Machine,
        mask: Tensor | None,
        y: Tensor,
    ) -> None:
        self.geometry, self.panels, self.mask, self.y = geometry, panels, mask, y
        self.vectors = Vectors(panels.lanes)
        # Accumulators, one vector row of the operand, and a broadcast fill the register file.
        widest = 4 if machine.registers >= 32 else 2
        self.nt = self._queries_at_once(widest, machine.l2_bytes)
        self.rows = min(6, (machine.registers - 2 - self.nt) // self.nt)
        self.padded = -(-geometry.tokens // panels.lanes) * panels.lanes

    def _queries_at_once(self, widest: int, l2_bytes: int) -> int:
        """Vectors of queries whose scores fill at most half of L2."""
        fitting = l2_bytes // 2 // (4 * self.geometry.tokens * self.panels.lanes)
        return max(1, min(widest, fitting))

    def head(self, unit: Any, sources: list[tuple[Tensor, Source]]) -> None:
        """Emit one head of one sequence."""
        g = self.geometry
        self.item, self.number = T.floordiv(unit, g.heads), T.floormod(unit, g.heads)
        shared = T.floordiv(self.number, g.heads // g.kv_heads)
        heads = (self.number, shared, shared)
        self.q, self.k, self.v = (
            self._gathered(tensor, source, head)
            for (tensor, source), head in zip(sources, heads, strict=True)
        )
        tiles = split_evenly(g.tokens, self.nt, self.panels.lanes)
        self.scores = B.alloc_buffer(
            (g.tokens * tiles.nt * self.panels.lanes,), "float32", scope="global"
        )
        with B.serial(0, tiles.total) as index:
            emit_tile(tiles, self.panels.lanes, index, self._queries)

    def zeros(self) -> None:
        """Write the row of zeros behind the last feature of every panel."""
        v, features = self.vectors, self.geometry.heads * self.geometry.depth

        def panel(first: Any, nt: int) -> None:
            write_zeros(v, self.y.flat, first * (features + 1) + features * nt * v.lanes, nt)

        with B.serial(0, self.panels.tiles.total) as index:
            emit_tile(self.panels.tiles, v.lanes, index, panel)

    def _place(self, column: Any, features: int) -> tuple[Any, Any]:
        """Return where the first feature of a vector of tokens lies, and the distance of others."""
        v, tiles = self.vectors, self.panels.tiles
        width, narrow = tiles.nt * v.lanes, tiles.nt_rest * v.lanes
        first: Any = T.floordiv(column, width) * width
        stride: Any = T.int64(width)
        if tiles.rest:
            wide = tiles.full * width
            behind = wide + T.floordiv(column - wide, narrow) * narrow
            first = T.if_then_else(column < wide, first, behind)
            stride = T.if_then_else(column < wide, T.int64(width), T.int64(narrow))
        # Computed once for all features.
        kept = B.alloc_buffer((2,), "int64", scope="global")
        B.buffer_store(kept, first * (features + 1) + column - first, [0])
        B.buffer_store(kept, stride, [1])
        return kept[0], kept[1]

    def _gathered(self, tensor: Tensor, source: Source, head: Any) -> Any:
        """Copy one head of one sequence to [depth][tokens]."""
        v, g = self.vectors, self.geometry
        copy = B.alloc_buffer((g.depth * self.padded,), "float32", scope="global")

        with B.serial(0, self.padded // v.lanes) as number:
            column = self.item * g.tokens + number * v.lanes
            base, stride = self._place(column, source.features)
            with B.serial(0, g.depth) as feature:
                row = source.first + head * g.depth + feature
                value = v.load(tensor.flat, base + row * stride)
                v.store(copy, value, feature * self.padded + number * v.lanes)
        return copy

    def _queries(self, first: Any, nt: int) -> None:
        """Emit some vectors of queries: scores, softmax, and the sum of values."""
        g, v = self.geometry, self.vectors
        width = nt * v.lanes
        keys: Any = g.tokens
        if g.mask == "causal":
            keys = T.min(T.Cast("int32", first) + width, g.tokens)
        largest = [v.register() for _ in range(nt)]
        for register in largest:
            v.store(register, v.splat(T.float32(float("-inf"))))
        self._products(
            nt,
            (g.tokens, keys),
            g.depth,
            lambda key, d: self.k[d * self.padded + key],
            lambda d: (self.q, d * self.padded + first),
            lambda key, sums: self._store_scores(key, sums, first, nt, largest),
        )
        totals = [v.register() for _ in range(nt)]
        for register in totals:
            v.store(register, v.zero())
        with B.serial(0, keys) as key:
            for j in range(nt):
                at = key * width + j * v.lanes
                shifted = v.keep(v.load(self.scores, at) - v.load(largest[j]))
                share = v.keep(exp2_nonpositive(shifted, v.lanes))
                v.store(totals[j], v.load(totals[j]) + share)
                v.store(self.scores, share, at)
        inverse = [v.keep(v.splat(T.float32(1.0)) / v.load(total)) for total in totals]
        output = B.alloc_buffer((g.depth * width,), "float32", scope="global")

        def store(d: Any, sums: list[Any]) -> None:
            for j, register in enumerate(sums):
                v.store(output, v.load(register) * inverse[j], d * width + j * v.lanes)

        self._products(
            nt,
            (g.depth, g.depth),
            keys,
            lambda d, key: self.v[d * self.padded + key],
            lambda key: (self.scores, key * width),
            store,
        )
        self._write(output, first, nt)

    def _store_scores(
        self, key: Any, sums: list[Any], first: Any, nt: int, largest: list[Any]
    ) -> None:
        g, v = self.geometry, self.vectors
        for j, register in enumerate(sums):
            # Scores and mask to the base of two, whose power is cheaper.
            value = v.load(register) * v.splat(T.float32(g.scale * LOG2_E))
            value = v.keep(self._masked(value, key, first + j * v.lanes))
            v.store(largest[j], T.Max(v.load(largest[j]), value))
            v.store(self.scores, value, key * (nt * v.lanes) + j * v.lanes)

    def _masked(self, value: Any, key: Any, query: Any) -> Any:
        """Add the mask to the scores of one key and a vector of queries."""
        g, v = self.geometry, self.vectors
        if g.mask == "none":
            return value
        if g.mask == "causal":
            seen = v.mask(T.Cast("int32", key - query))
            return T.Select(seen, v.splat(T.float32(float("-inf"))), value)
        assert self.mask is not None
        item = self.item if g.mask_batch > 1 else 0
        head = self.number if g.mask_heads > 1 else 0
        row = (item * g.mask_heads + head) * g.tokens + key
        at = row * g.tokens + query
        if g.mask == "keys":
            mask = v.splat(self.mask.flat[row])
        elif g.tokens % v.lanes == 0:
            mask = v.load(self.mask.flat, at)
        else:
            mask = v.load_masked(self.mask.flat, at, T.Cast("int32", g.tokens - query))
        return value + mask * v.splat(T.float32(LOG2_E))

    def _products(
        self,
        nt: int,
        rows: tuple[int, Any],
        depth: Any,
        factor: Callable[[Any, Any], Any],
        operand: Callable[[Any], tuple[Any, Any]],
        store: Callable[[Any, list[Any]], None],
    ) -> None:
        """Emit result[r] = sum_k factor(r, k) * operand(k), in register tiles that may overlap.

        `rows` are how many there are, and how many are wanted; tiles of the latter are computed.
        An operand is a buffer, and where in it the vectors lie.
        """
        v, (count, wanted) = self.vectors, rows
        height = math.ceil(count / math.ceil(count / self.rows))
        with B.serial(0, T.floordiv(wanted + height - 1, height)) as step:
            start = T.min(step * height, count - height)
            tile = RegisterTile(v, height, nt)
            tile.clear()
            with B.serial(0, depth) as k:

                def weight_of(r: int, start: Any = start, k: Any = k) -> Any:
                    return v.splat(factor(start + r, k))

                tile.multiply(list(range(height)), weight_of, *operand(k))
            for r, registers in enumerate(tile.acc):
                store(start + r, registers)

    def _write(self, output: Any, first: Any, nt: int) -> None:
        """Copy results [depth][queries] to their panels."""
        g, v = self.geometry, self.vectors
        for j in range(nt):
            column = self.item * g.tokens + first + j * v.lanes
            base, stride = self._place(column, g.heads * g.depth)
            with B.serial(0, g.depth) as d:
                value = v.load(output, d * (nt * v.lanes) + j * v.lanes)
                v.store(self.y.flat, value, base + (self.number * g.depth + d) * stride)
