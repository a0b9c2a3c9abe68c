"""Relax modules, with bound or free parameters, become a Model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..errors import ModelError
from ..model import Model, TensorSpec
from ..passes.canonicalize import canonicalize
from ..passes.rewrite_main import main_of, with_main
from .overlay import lay_over_parameters
from .shapes import solve_dimensions


def load_relax(
    mod: tvm.IRModule,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    params: Mapping[str, Any] | None = None,
    weights: Any = None,
) -> Model:
    """Make a `Model` of a module with a function `main`.

    Weights are constants in the body, parameters named in `params`, or parameters behind the first
    `num_input` whose values stand in the attribute ``params`` (as TVM's importers leave them).
    `weights` is as for `load`; it replaces values of parameters, by their names.

    Raises
    ------
    ModelError
        When there is no `main`, or values and parameters do not fit each other.
    """
    func = main_of(mod)
    values = _attached_values(func)
    values.update({name: as_numpy(value) for name, value in (params or {}).items()})
    names = [var.name for var in func.params]
    if len(set(names)) != len(names):
        raise ModelError("two parameters of 'main' have the same name")
    unknown = [name for name in values if name not in names]
    if unknown:
        raise ModelError(f"'main' has no parameter '{unknown[0]}'")
    _refuse_missing(func, values)
    notes: tuple[str, ...] = ()
    if weights is not None:
        overlay = lay_over_parameters(values, weights)
        values, notes = {**values, **overlay.values}, overlay.notes
    func = _inputs_first(func, values)
    inputs = [var for var in func.params if var.name not in values]
    specs = tuple(spec_of(var.name, var.ty) for var in inputs)
    model = Model(
        mod=with_main(mod, func.with_attr("num_input", len(inputs))),
        params={var.name: values[var.name] for var in func.params if var.name in values},
        layer_names={},
        inputs=specs,
        outputs=(),
        source="a Relax module",
        notes=notes,
    )
    return finish(model, shapes=shapes)


def finish(
    model: Model,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    output_names: Sequence[str] | None = None,
    symbols: Mapping[str, str] | None = None,
) -> Model:
    """Check values, fix dimensions, canonicalise and describe the outputs.

    Parameters
    ----------
    symbols : mapping of str to str, optional
        The user's name of a symbolic dimension, by its name in the module.
    """
    _check_values(model)
    solved = solve_dimensions(model.inputs, shapes)
    if solved:
        model = _bind_dimensions(model, solved)
    model = canonicalize(model)
    types = _tensor_types(main_of(model.mod).ret_ty)
    names = list(output_names or [])
    if len(names) != len(types):
        names = ["output"] if len(types) == 1 else [f"output_{i}" for i in range(len(types))]
    outputs = tuple(spec_of(name, ty, symbols) for name, ty in zip(names, types, strict=True))
    return replace(model, outputs=outputs)


def spec_of(name: str, ty: Any, symbols: Mapping[str, str] | None = None) -> TensorSpec:
    """Describe a tensor type for the user.

    Raises
    ------
    ModelError
        When it is no tensor of known rank.
    """
    if not isinstance(ty, relax.TensorType) or ty.ndim < 0:
        raise ModelError(f"'{name}' is not a tensor of known rank ({ty})")
    if not isinstance(ty.shape, relax.ShapeExpr):
        return TensorSpec(name, tuple(f"{name}_{i}" for i in range(ty.ndim)), str(ty.dtype))
    dims = tuple(_dim(dim, symbols or {}) for dim in ty.shape.values)
    return TensorSpec(name, dims, str(ty.dtype))


def _dim(dim: Any, symbols: Mapping[str, str]) -> int | str:
    if isinstance(dim, tvm.tirx.IntImm):
        return int(dim)
    text = str(dim).replace("T.int64(", "").replace(")", "") if "T.int64" in str(dim) else str(dim)
    return symbols.get(text, text)


def as_numpy(value: Any) -> np.ndarray:
    """View an array of NumPy, TVM or PyTorch as a NumPy array."""
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return value.numpy() if hasattr(value, "numpy") else np.asarray(value)


def _attached_values(func: relax.Function) -> dict[str, np.ndarray]:
    attrs = dict(func.attrs or {})
    if "params" not in attrs:
        return {}
    weights = func.params[int(attrs.get("num_input", len(func.params) - len(attrs["params"]))) :]
    if len(weights) != len(attrs["params"]):
        raise ModelError(
            f"'main' has {len(weights)} weight parameters but {len(attrs['params'])} values"
        )
    return {var.name: as_numpy(value) for var, value in zip(weights, attrs["params"], strict=True)}


def _refuse_missing(func: relax.Function, values: Mapping[str, np.ndarray]) -> None:
    split = dict(func.attrs or {}).get("num_input")
    if split is None:
        return
    missing = [var.name for var in func.params[int(split) :] if var.name not in values]
    if missing:
        raise ModelError(f"the weight '{missing[0]}' of 'main' has no value; pass it in params")


def _inputs_first(func: relax.Function, values: Mapping[str, np.ndarray]) -> relax.Function:
    ordered = sorted(func.params, key=lambda var: var.name in values)
    attrs = func.attrs
    return relax.Function(ordered, func.body, func.ret_ty, bool(func.is_pure), attrs)


def _check_values(model: Model) -> None:
    for var in main_of(model.mod).params:
        value = model.params.get(var.name)
        if value is None:
            continue
        spec = spec_of(var.name, var.ty)
        if spec.shape != value.shape or spec.dtype != str(value.dtype):
            raise ModelError(
                f"the value of '{var.name}' is {value.dtype} {value.shape}, "
                f"but 'main' declares {spec.dtype} {spec.shape}"
            )


def _bind_dimensions(model: Model, solved: Mapping[str, int]) -> Model:
    func = main_of(model.mod)
    free = {var.name: var for var in relax.analysis.free_symbolic_vars(func)}
    free.update({var.name: var for var in relax.analysis.defined_symbolic_vars(func)})
    binding = {
        free[name]: tvm.tirx.IntImm("int64", size) for name, size in solved.items() if name in free
    }
    func = func.bind_symbolic_vars(binding)
    attrs = dict(func.attrs or {})
    for key in ("tir_var_lower_bound", "tir_var_upper_bound"):
        if key in attrs:
            kept = {k: v for k, v in attrs[key].items() if k not in solved}
            func = func.with_attr(key, kept) if kept else func.without_attr(key)
    inputs = tuple(
        replace(
            spec, shape=tuple(solved.get(d, d) if isinstance(d, str) else d for d in spec.shape)
        )
        for spec in model.inputs
    )
    return replace(model, mod=with_main(model.mod, func), inputs=inputs)


def _tensor_types(ty: Any) -> list[Any]:
    fields = getattr(ty, "fields", None)
    if fields is None:
        return [ty]
    return [leaf for field in fields for leaf in _tensor_types(field)]
