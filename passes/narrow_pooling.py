"""Write a three-dimensional pooling over one axis as a two-dimensional one.

TVM's importer makes such a pooling of local response normalisation (LRN). The other two axes count
as one, so that the schedules of two-dimensional pooling serve it.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from ..model import Model
from .rewrite_main import MainRewriter, call_of, shape_of

_POOLS = {"nn.avg_pool3d": relax.op.nn.avg_pool2d, "nn.max_pool3d": relax.op.nn.max_pool2d}


def narrow_pooling(model: Model) -> Model:
    """Rewrite pooling with a window (n, 1, 1) over NCDHW to a window (n, 1) over (N, C, D, H*W)."""
    return MainRewriter(model).run(_narrow)


def _narrow(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
    name = next((name for name in _POOLS if call_of(expr, name)), None)
    dims, result = shape_of(expr.args[0]) if name else None, shape_of(var)
    if name is None or dims is None or result is None or len(dims) != 5:
        return None
    attrs = expr.attrs
    window, strides, dilation = (
        [int(size) for size in sizes] for sizes in (attrs.pool_size, attrs.strides, attrs.dilation)
    )
    pads = [int(size) for size in attrs.padding]
    one_axis = (
        window[1:] == [1, 1] and strides[1:] == [1, 1] and pads[1:3] == [0, 0] == pads[4:]
    )  # fmt: skip
    if attrs.layout != "NCDHW" or attrs.out_layout not in ("", "NCDHW") or not one_axis:
        return None
    flat = rewriter.emit(relax.op.reshape(expr.args[0], [*dims[:3], dims[3] * dims[4]]))
    pooled = _POOLS[name](
        flat,
        pool_size=(window[0], 1),
        strides=(strides[0], 1),
        padding=(pads[0], 0, pads[3], 0),
        dilation=(dilation[0], 1),
        ceil_mode=bool(attrs.ceil_mode),
        count_include_pad=bool(attrs.count_include_pad),
    )
    return relax.op.reshape(rewriter.emit(pooled, var.name), list(result))
