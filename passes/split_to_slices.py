"""Replace a split along the last axis by one slice a piece, which each reader takes on its own."""

from __future__ import annotations

from typing import Any

from tvm import relax

from ..model import Model
from .rewrite_main import MainRewriter, call_of, static_shape


def split_to_slices(model: Model) -> Model:
    """Rewrite ``split(x)[i]`` to ``strided_slice(x)``."""
    return MainRewriter(model).run(_slice)


def _slice(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
    if not isinstance(expr, relax.TupleGetItem):
        return None
    split = rewriter.lookup(expr.tuple_value)
    if not call_of(split, "split"):
        return None
    source, shape = split.args[0], static_shape(var)
    if shape is None or int(split.attrs.axis) % len(shape) != len(shape) - 1:
        return None
    sections = split.attrs.indices_or_sections
    if hasattr(sections, "__len__"):
        begin = [0, *(int(index) for index in sections)][int(expr.index)]
    else:
        # All pieces but the last have the same size, which rounds up.
        whole = static_shape(source)
        if whole is None:
            return None
        begin = int(expr.index) * -(-whole[-1] // int(sections))
    return relax.op.strided_slice(source, [len(shape) - 1], [begin], [begin + shape[-1]])
