"""The canonical form of a model, which every phase behind `load` relies on.

The module
    `main` takes the user's inputs, then one variable per weight; its attribute `num_input` counts
    the inputs, and there is no attribute `params`: the values are NumPy arrays in `Model.params`,
    contiguous, one for each weight variable, and each is read. The body is one dataflow block in
    A-normal form without dead bindings. An If stands in a function that `main` calls. Other
    functions of the module are left alone.
Constants
    A weight is a floating-point array of one dimension or more, and always a parameter. Scalars and
    integer or boolean arrays are inline constants; so are quantised weights behind `dequantize`.
    What is computed from weights alone is evaluated.
Matmul
    With a constant right-hand side it is ``R.matmul(x, w)`` with `w` a two-dimensional parameter
    [K, M]: no transpose, reshape or broadcast stands between. (A weight with real batch dimensions
    stays as it is.) A bias is ``R.add(y, b)`` with `b` of shape (M,).
Convolution
    ``R.nn.conv2d(x, w)`` in NCHW and OIHW with a parameter `w`; a bias is ``R.add(y, b)`` with
    a parameter `b` of shape (1, C, 1, 1).
Normalisation
    BatchNorm at inference is gone: in the weight and bias before it, or a multiply and an add.
    Layer normalisation is ``R.nn.layer_norm(x, gamma, beta)``, of root mean squares
    ``R.nn.rms_norm(x, gamma)``; GELU may stay decomposed. In bfloat16 the former is cast around.
Split
    Along the last axis it is one ``R.strided_slice`` a piece.
Order
    In a commutative operator a constant stands on the right; one element is a scalar there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax

from ..dtypes import is_float
from ..model import Model
from .drop_no_ops import drop_no_ops
from .flatten_main import flatten_main
from .fold_batch_norm import fold_batch_norm
from .fold_weight_transforms import fold_weight_transforms
from .follow_axes import follow_axes
from .lift_weights import is_weight_constant, lift_weights
from .mend_expand import mend_expand
from .narrow_pooling import narrow_pooling
from .recognize_gelu import recognize_gelu
from .recognize_layer_norm import recognize_layer_norm
from .recognize_rms_norm import recognize_rms_norm
from .rewrite_main import (
    bindings_of,
    call_of,
    count_uses,
    main_of,
    operands_of,
    same_shape,
)
from .simplify_softmax import simplify_softmax
from .sink_reshapes import sink_reshapes
from .split_to_slices import split_to_slices
from .tidy_params import tidy_params
from .unstack_reductions import unstack_reductions
from .widen_bfloat16 import widen_bfloat16

PASSES: tuple[Callable[[Model], Model], ...] = (
    flatten_main,
    mend_expand,
    unstack_reductions,
    split_to_slices,
    narrow_pooling,
    lift_weights,
    fold_weight_transforms,
    drop_no_ops,
    simplify_softmax,
    follow_axes,
    sink_reshapes,
    follow_axes,
    recognize_layer_norm,
    recognize_rms_norm,
    recognize_gelu,
    fold_batch_norm,
    widen_bfloat16,
    tidy_params,
)


def canonicalize(model: Model) -> Model:
    """Bring a freshly imported model into the canonical form (see the module's docstring).

    Parameters
    ----------
    model : Model
        `main` has the attribute `num_input`, and a value for each parameter behind the inputs.

    Raises
    ------
    ModelError
        When `main` cannot be rewritten: local functions, side effects.
    """
    for change in PASSES:
        model = change(model)
    return model


def check_canonical(model: Model) -> list[str]:
    """List what is not canonical about a model, in words; an empty list is what tests want."""
    func = main_of(model.mod)
    faults = _check_signature(model, func)
    if len(func.body.blocks) != 1 or not isinstance(func.body.blocks[0], relax.DataflowBlock):
        faults.append("the body is not one dataflow block")
    uses = count_uses(func)
    for binding in bindings_of(func):
        if uses[binding.var] == 0 and not isinstance(binding, relax.MatchCast):
            faults.append(f"'{binding.var.name}' is dead")
        faults.extend(_check_binding(model, binding))
    return faults


def _check_signature(model: Model, func: relax.Function) -> list[str]:
    faults = []
    split = int(func.attrs["num_input"])
    weights = func.params[split:]
    if "params" in dict(func.attrs):
        faults.append("the attribute 'params' is still there")
    if split != len(model.inputs):
        faults.append(f"num_input is {split} but the model has {len(model.inputs)} inputs")
    if [var.name for var in weights] != list(model.params):
        faults.append("the weight variables and Model.params differ")
    if set(model.params) != set(model.layer_names):
        faults.append("Model.layer_names and Model.params have different keys")
    uses = count_uses(func)
    for var in weights:
        value = model.params[var.name]
        faults.extend(
            f"weight '{var.name}' {fault}"
            for fault, holds in (
                ("is never read", uses[var] == 0),
                ("is not contiguous", not value.flags.c_contiguous),
                ("is a scalar", value.ndim == 0),
                ("is not floating point", not is_float(value.dtype)),
                ("has another shape than its value", _shape(var) != value.shape),
                ("has another type than its value", str(var.ty.dtype) != str(value.dtype)),
            )
            if holds
        )
    return faults


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(int(dim) for dim in var.ty.shape.values)


def _check_binding(model: Model, binding: Any) -> list[str]:
    name, value = binding.var.name, binding.value
    faults: list[str] = []
    leaves = operands_of(value)
    if isinstance(value, relax.Call):
        nested = [arg for arg in value.args if isinstance(arg, relax.Call)]
        faults.extend(f"'{name}' has a nested call" for _ in nested)
    if any(is_weight_constant(leaf) for leaf in leaves):
        faults.append(f"'{name}' holds a float constant that is no scalar")
    if call_of(value, "matmul"):
        faults.extend(_check_matmul(model, name, value))
    if call_of(value, "nn.batch_norm") and all(_is_weight(model, arg) for arg in value.args[1:5]):
        faults.append(f"'{name}' is a BatchNorm that could be folded")
    for op_name in ("reshape", "broadcast_to", "permute_dims", "astype"):
        if call_of(value, op_name) and _is_weight(model, value.args[0]):
            faults.append(f"'{name}' transforms a weight ({op_name})")
    if call_of(value, "reshape") and same_shape(value.args[0], binding.var):
        faults.append(f"'{name}' reshapes to the same shape")
    return faults


def _is_weight(model: Model, leaf: Any) -> bool:
    return isinstance(leaf, relax.Var) and leaf.name in model.params


def _check_matmul(model: Model, name: str, call: Any) -> list[str]:
    weight = call.args[1]
    if isinstance(weight, tvm.ir.GenericConst) and is_float(weight.ty.dtype):
        return [f"'{name}' multiplies by an inline constant"]
    return []
