"""Fold batch normalisation and channel-wise scales into the convolution or matmul before them.

A chain of channel-wise steps (a bias, BatchNorm, a scale) is ``y = s * x + t`` with one `s` and `t`
per channel. It is composed in float64 and rounded once. A zero in a weight stays exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax

from ..model import Model
from .rewrite_main import MainRewriter, call_of, dtype_of, map_operands, same_shape, shape_of

_CONVOLUTIONS = {
    "nn.conv1d": ("NCW", "OIW"),
    "nn.conv2d": ("NCHW", "OIHW"),
    "nn.conv3d": ("NCDHW", "OIDHW"),
}
_STEPS = ("add", "subtract", "multiply", "divide")


def fold_batch_norm(model: Model) -> Model:
    """Absorb channel-wise chains into weights; elsewhere BatchNorm becomes a multiply and an add.

    A chain is absorbed only where each value on the way has one user. A lone bias stays an ``add``
    with a parameter of shape (1, C, 1, 1) behind a conv2d, (M,) behind a matmul.
    """
    return MainRewriter(model).run(_ChainFolder())


@dataclass(frozen=True)
class _Chain:
    """``scale * root + shift`` along `axis`: what a variable equals, step by step so far.

    Attributes
    ----------
    root : relax.Var
        Where the chain starts; with `weight` its producer, a convolution or matmul, may absorb it.
    names : tuple of str
        Parameter names for the scale and the shift, and the layer that both belong to.
    steps, is_batch_norm, is_plain
        How many steps; whether one is a BatchNorm; whether the only step has the right form.
    """

    root: Any
    weight: Any
    axis: int
    ndim: int
    scale: np.ndarray
    shift: np.ndarray
    names: tuple[str, str, str]
    steps: int = 0
    scaled: bool = False
    shifted: bool = False
    is_batch_norm: bool = False
    is_plain: bool = True

    def vector_shape(self) -> tuple[int, ...]:
        """Give the shape of a channel vector that broadcasts against the root."""
        if self.axis == self.ndim - 1:
            return (-1,)
        return tuple(-1 if axis == self.axis else 1 for axis in range(self.ndim))

    def _names_after(self, step: _Step) -> tuple[str, str, str]:
        scale = step.names[0] if step.scales and self.weight is None else self.names[0]
        return scale, step.names[1] if step.shifts else self.names[1], self.names[2]

    def after(self, step: _Step) -> _Chain:
        """Append one step."""
        return replace(
            self,
            scale=self.scale * step.scale,
            shift=self.shift * step.scale + step.shift,
            names=self._names_after(step),
            steps=self.steps + 1,
            scaled=self.scaled or step.scales,
            shifted=self.shifted or step.shifts,
            is_batch_norm=self.is_batch_norm or step.is_batch_norm,
            is_plain=self.is_plain and step.is_plain,
        )


@dataclass(frozen=True)
class _Step:
    """One operator as ``scale * x + shift``."""

    scale: np.ndarray
    shift: np.ndarray
    names: tuple[str, str]
    layer: str
    scales: bool
    shifts: bool
    is_batch_norm: bool = False
    is_plain: bool = False


class _ChainFolder:
    """The rule of this pass.

    Each value is emitted unfolded first; `chains` says what it equals. Where something else than a
    further step reads it, the folded form takes its place and the unfolded one dies.
    """

    def __init__(self) -> None:
        self.chains: dict[Any, _Chain] = {}

    def __call__(self, rewriter: MainRewriter, var: Any, expr: Any) -> Any:
        if _batch_norm_arrays(rewriter, expr) is not None:
            return expr
        chain = self._chain(rewriter, var, expr)
        if chain is None:
            return map_operands(expr, lambda leaf: self._folded(rewriter, leaf))
        unfolded = chain.root if chain.steps == 0 else rewriter.emit(expr, var.name)
        self.chains[unfolded] = chain
        if rewriter.uses[var] == 1 and var not in rewriter.results:
            return unfolded
        # Several users: the value itself is needed, so nothing behind it may go into its weight.
        result = self._folded(rewriter, unfolded)
        self.chains.pop(unfolded, None)
        return result

    def _chain(self, rewriter: MainRewriter, var: Any, expr: Any) -> _Chain | None:
        weight, axis = _absorbing_weight(rewriter, expr)
        dims = shape_of(var)
        if weight is not None and dims is not None:
            call = map_operands(expr, lambda leaf: self._folded(rewriter, leaf))
            name, layer = weight.name, rewriter.layers[weight]
            count = rewriter.params[weight].shape[1 if call_of(expr, "matmul") else 0]
            return _Chain(
                root=rewriter.emit(call, var.name),
                weight=weight,
                axis=axis % len(dims),
                ndim=len(dims),
                scale=np.ones(count),
                shift=np.zeros(count),
                names=(name, f"{name}_bias", layer),
            )
        return self._step_onto(rewriter, var, expr)

    def _step_onto(self, rewriter: MainRewriter, var: Any, expr: Any) -> _Chain | None:
        data, axis, vectors = _read_step(rewriter, var, expr)
        if data is None or dtype_of(data) != dtype_of(var):
            return None
        chain = self.chains.get(data)
        if chain is None:
            chain = _start(data, axis, vectors[0].size)
        if chain is None or (axis is not None and axis != chain.axis):
            chain = _start(self._folded(rewriter, data), axis, vectors[0].size)
        if chain is None:
            return None
        step = _step(rewriter, expr, vectors, chain.vector_shape())
        if chain.steps == 0 and chain.weight is None:
            chain = replace(chain, names=(*step.names, step.layer))
        with np.errstate(all="ignore"):
            return chain.after(step)

    def _folded(self, rewriter: MainRewriter, leaf: Any) -> Any:
        chain = self.chains.get(leaf) if isinstance(leaf, relax.Var) else None
        if chain is None or chain.steps == 0:
            return leaf
        if chain.steps == 1 and chain.is_plain:
            return leaf
        absorbs = chain.weight is not None and chain.scaled and _can_absorb(rewriter, chain)
        result = _absorb(rewriter, chain) if absorbs else chain.root
        dtype = dtype_of(chain.root)
        if chain.scaled and not absorbs:
            result = rewriter.emit(relax.op.multiply(result, _vector(rewriter, chain, 0, dtype)))
        if chain.shifted:
            result = rewriter.emit(relax.op.add(result, _vector(rewriter, chain, 1, dtype)))
        # Also the answer for whoever reads the unfolded value later on.
        self.chains[leaf] = replace(chain, root=result, steps=0)
        return result


def _vector(rewriter: MainRewriter, chain: _Chain, which: int, dtype: str) -> Any:
    values = (chain.scale, chain.shift)[which].reshape(chain.vector_shape()).astype(dtype)
    return rewriter.add_param(values, chain.names[which], chain.names[2])


def _can_absorb(rewriter: MainRewriter, chain: _Chain) -> bool:
    finite = np.isfinite(chain.scale).all() and np.isfinite(chain.shift).all()
    return bool(finite) and dtype_of(chain.weight) in ("float32", "float64")


def _absorb(rewriter: MainRewriter, chain: _Chain) -> Any:
    call = rewriter.lookup(chain.root)
    weight = rewriter.params[chain.weight]
    # The output channels: columns of a matmul's [K, M], the first axis of a convolution's OIHW.
    shape = (1, -1) if call_of(call, "matmul") else (-1, *[1] * (weight.ndim - 1))
    scaled = np.empty(weight.shape, weight.dtype)
    np.multiply(
        weight, chain.scale.reshape(shape), out=scaled, casting="same_kind", dtype="float64"
    )
    param = rewriter.add_param(scaled, chain.weight.name, chain.names[2])
    return rewriter.emit(relax.Call(call.op, [call.args[0], param], call.attrs, call.ty_args))


def _absorbing_weight(rewriter: MainRewriter, expr: Any) -> tuple[Any, int]:
    if call_of(expr, "matmul") and expr.args[1] in rewriter.params:
        return (expr.args[1] if expr.args[1].ty.ndim == 2 else None), -1
    for name, (data_layout, kernel_layout) in _CONVOLUTIONS.items():
        if (
            call_of(expr, name)
            and expr.args[1] in rewriter.params
            and expr.attrs.data_layout == data_layout
            and expr.attrs.kernel_layout == kernel_layout
            and expr.attrs.out_layout in ("", data_layout)
        ):
            return expr.args[1], 1
    return None, 0


def _start(data: Any, axis: int | None, count: int) -> _Chain | None:
    dims = shape_of(data)
    if axis is None or dims is None:
        return None
    return _Chain(data, None, axis, len(dims), np.ones(count), np.zeros(count), ("", "", ""))


def _batch_norm_arrays(rewriter: MainRewriter, expr: Any) -> list[np.ndarray] | None:
    if not call_of(expr, "nn.batch_norm") or expr.attrs.training:
        return None
    if not all(leaf in rewriter.params for leaf in expr.args[1:5]):
        return None
    return [rewriter.params[leaf].astype(np.float64) for leaf in expr.args[1:5]]


def _read_step(
    rewriter: MainRewriter, var: Any, expr: Any
) -> tuple[Any, int | None, list[np.ndarray]]:
    """Return the data, the channel axis (None: any) and the constant vectors of a step."""
    nothing: tuple[Any, int | None, list[np.ndarray]] = (None, None, [])
    if isinstance(expr, relax.TupleGetItem) and expr.index == 0:
        call = rewriter.lookup(expr.tuple_value)
        arrays = _batch_norm_arrays(rewriter, call)
        dims = shape_of(var)
        if arrays is None or dims is None:
            return nothing
        return call.args[0], int(call.attrs.axis) % len(dims), arrays
    if not any(call_of(expr, name) for name in _STEPS) or expr.args[1] not in rewriter.params:
        return nothing
    data, vector = expr.args[0], rewriter.params[expr.args[1]]
    if data in rewriter.params or vector.ndim > data.ty.ndim or not same_shape(data, var):
        return nothing
    offset = data.ty.ndim - vector.ndim
    wide = [axis + offset for axis, size in enumerate(vector.shape) if size != 1]
    if len(wide) > 1:
        return nothing
    return data, (wide[0] if wide else None), [vector]


def _step(
    rewriter: MainRewriter, expr: Any, vectors: list[np.ndarray], shape: tuple[int, ...]
) -> _Step:
    if isinstance(expr, relax.TupleGetItem):
        return _batch_norm_step(rewriter, rewriter.lookup(expr.tuple_value), vectors)
    param = expr.args[1]
    vector = vectors[0].astype(np.float64).reshape(-1)
    name = expr.op.name.removeprefix("relax.")
    with np.errstate(all="ignore"):
        scale = {"multiply": vector, "divide": 1.0 / vector}.get(name, np.ones_like(vector))
    shift = {"add": vector, "subtract": -vector}.get(name, np.zeros_like(vector))
    return _Step(
        scale=scale,
        shift=shift,
        names=(param.name, param.name),
        layer=rewriter.layers[param],
        scales=name in ("multiply", "divide"),
        shifts=name in ("add", "subtract"),
        is_plain=vectors[0].shape == vector.reshape(shape).shape,
    )


def _batch_norm_step(rewriter: MainRewriter, call: Any, vectors: list[np.ndarray]) -> _Step:
    gamma, beta, mean, variance = vectors
    gamma = gamma if call.attrs.scale else np.ones_like(gamma)
    beta = beta if call.attrs.center else np.zeros_like(beta)
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + float(call.attrs.epsilon))
    names = (call.args[1].name, call.args[2].name)
    layer = rewriter.layers[call.args[2]]
    return _Step(scale, beta - mean * scale, names, layer, True, True, is_batch_norm=True)
