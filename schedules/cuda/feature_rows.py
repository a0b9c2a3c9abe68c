"""Matrix products with any columns gathered, for tensor cores: by features, or turned first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as B

from ...workload import Epilogue, MatmulGeometry
from .gathered_columns import GatheredColumns, copied_at_once
from .results import Results
from .slabs import RowOf, store_feature_rows, store_token_rows
from .tensor_tiles import TensorShape
from .token_rows import tiles_of
from .transpose import transpose_tokens, turned_place, turned_shape


class FeatureRows(GatheredColumns):
    """x [k][n] in and y [m][n] out."""

    def __init__(self, geometry: MatmulGeometry, epilogue: Epilogue, shape: TensorShape) -> None:
        super().__init__(shape, copied_at_once(geometry.n, shape.element_bytes))
        self.geometry = geometry
        self.tokens = tirx.Var("n", "int64") if geometry.n is None else geometry.n
        self.results = Results(epilogue, geometry.m, (geometry.m, self.tokens), shape.dtype)

    def declare_input(self) -> None:
        """Declare x."""
        self.x = B.arg("x", B.Buffer((self.geometry.k, self.tokens), self.shape.dtype))

    def grid(self) -> dict[str, Any]:
        """Tiles of tokens."""
        return {"y": tiles_of(self.geometry.n, self.tokens, self.shape.nt)}

    def source(self, entry: Sequence[Any], column: Any) -> tuple[Any, Any]:
        """Find a token's feature; those behind the last token are not there."""
        n = self.first + column
        whole = self.geometry.n is not None and self.geometry.n % self.shape.nt == 0
        return self.x[entry[0], n], None if whole else n < self.tokens

    def store(self, slab: Any, row_of: RowOf) -> None:
        """Write the results of a slab."""
        store_feature_rows(
            slab,
            self.shape,
            self.threads,
            self.results,
            row_of,
            (self.first, self.tokens),
            lambda row, token: [row, token],
            paired=self.geometry.n is not None and self.geometry.n % 2 == 0,
        )


class TurnedTokens(GatheredColumns):
    """x [n][k] in, turned in a launch of its own, and y [n][m] out."""

    def __init__(self, geometry: MatmulGeometry, epilogue: Epilogue, shape: TensorShape) -> None:
        super().__init__(shape, shape.piece)
        self.geometry = geometry
        self.tokens = tirx.Var("n", "int64") if geometry.n is None else geometry.n
        self.results = Results(epilogue, geometry.m, (self.tokens, geometry.m), shape.dtype)

    def declare_input(self) -> None:
        """Declare x."""
        self.x = B.arg("x", B.Buffer((self.tokens, self.geometry.k), self.shape.dtype))

    def grid(self) -> dict[str, Any]:
        """Tiles of tokens."""
        return {"y": tiles_of(self.geometry.n, self.tokens, self.shape.nt)}

    def prepare(self) -> None:
        """Turn x."""
        k = self.geometry.k
        shape = turned_shape(self.tokens, k)
        self.turned = B.alloc_buffer(shape, self.shape.dtype, scope="global")
        IRBuilder.name("turned", self.turned)
        transpose_tokens(self.x, self.turned, self.tokens, k)

    def source(self, entry: Sequence[Any], column: Any) -> tuple[Any, Any]:
        """Find a token's feature; behind the last token are zeros, up to a whole piece."""
        n = self.first + column
        return self.turned[turned_place(entry[0], n)], n < self.tokens

    def store(self, slab: Any, row_of: RowOf) -> None:
        """Write the results of a slab."""
        store_token_rows(
            slab, self.shape, self.threads, self.results, row_of, self.first, self.tokens
        )
