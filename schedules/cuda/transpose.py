"""Turn tokens in rows to features in rows, in a launch of its own before the product."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...dtypes import numpy_dtype
from .threads import barrier, launch, local, shared

# Tokens and features of a tile, warps that share it, and bytes read or written as one.
_TILE, _WARPS, _WORD = 64, 8, 4
# Blocks that a multiprocessor shall hold.
_AT_ONCE = 8


def transpose_tokens(x: Any, turned: Any, tokens: Any, features: int) -> None:
    """Launch the copy of x [tokens, features] to `turned`, see `turned_shape`.

    What is behind the last token becomes zero.
    """
    dtype = str(turned.dtype)
    out = _WORD // numpy_dtype(dtype).itemsize
    width = out if features % out == 0 else 1
    grid = {"x": turned.shape[0], "y": -(-features // _TILE)}
    with launch(grid, _WARPS, _AT_ONCE) as (numbers, threads):
        first_token, first_feature = numbers[0] * _TILE, numbers[1] * _TILE
        tile = shared(_TILE * _TILE, dtype)

        def place_of(feature: Any, token: Any) -> Any:
            # Words are shifted by the feature, so that lanes with a token each of other features
            # write different banks, as those with words of one feature read them.
            shift = T.floormod(T.floordiv(feature, width), _TILE // out)
            word = T.bitwise_xor(T.floordiv(token, out), shift)
            return feature * _TILE + word * out + T.floormod(token, out)

        read = local(width, dtype)
        whole = B.ramp(0, 1, width) if width > 1 else 0
        across = _TILE // width
        with threads.share(across * _TILE) as i:
            token, feature = T.floordiv(i, across), T.floormod(i, across) * width
            n, k = first_token + token, first_feature + feature
            place = B.ramp(k, 1, width) if width > 1 else k
            for j in range(width):
                B.buffer_store(read, T.Cast(dtype, T.float32(0)), [j])
            with B.If(T.And(n < tokens, k < features)), B.Then():
                B.buffer_store(read, x[n, place], [whole])
            for j in range(width):
                B.buffer_store(tile, read[j], [place_of(feature + j, token)])
        barrier()
        across = _TILE // out
        with threads.share(across * _TILE) as i:
            feature, token = T.floordiv(i, across), T.floormod(i, across) * out
            k, at = first_feature + feature, place_of(feature, token)
            with B.If(k < features), B.Then():
                word = tile[B.ramp(at, 1, out) if out > 1 else at]
                place = B.ramp(token, 1, out) if out > 1 else token
                B.buffer_store(turned, word, [numbers[0], k, place])


def turned_shape(tokens: Any, features: int) -> tuple[Any, int, int]:
    """Return the shape of turned tokens: tiles of 64 of them, features, tokens of the tile."""
    whole = isinstance(tokens, int)
    return (-(-tokens // _TILE) if whole else T.ceildiv(tokens, _TILE), features, _TILE)


def turned_place(feature: Any, token: Any) -> tuple[Any, Any, Any]:
    """Tell where a token's feature is."""
    return T.floordiv(token, _TILE), feature, T.floormod(token, _TILE)
