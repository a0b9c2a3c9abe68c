"""`load`: whatever holds a model becomes a canonical `Model`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ModelError
from ..model import Model
from .tensor_files import is_checkpoint


def load(
    source: Any,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    params: Mapping[str, Any] | None = None,
    weights: Any = None,
) -> Model:
    """Read a model and bring it into the form that every later phase works on.

    Parameters
    ----------
    source : path, bytes, onnx.ModelProto, torch.export.ExportedProgram, tvm.IRModule or Model
        A `Model` is returned as it is.
    shapes : mapping of str to sequence of int, optional
        Fixes symbolic dimensions, by the name of an input. A symbol that several inputs share is
        fixed in all of them.
    params : mapping of str to array, optional
        Values of free parameters of a Relax module, by parameter name.
    weights : path, or mapping of str to array, optional
        Takes the place of the model's own weights, by name: a ``.safetensors`` file, the index of
        several or their folder, or a `state_dict`. Weights with masks, masks alone, and the packed
        forms of compressed-tensors are understood; what was laid over stands in the model's notes,
        and so in every report. Names and layouts are those of PyTorch or of the model.

    Returns
    -------
    Model
        In the canonical form of `tvm_sparse.passes.canonicalize`.

    Raises
    ------
    ModelError
        When the source cannot be read, holds an operator that cannot be imported, or when `shapes`,
        `params` or `weights` do not fit it.
    MissingExtraError
        When an optional package is needed and not installed.
    """
    if isinstance(source, Model):
        if shapes or params or weights is not None:
            raise ModelError(
                "a model that is loaded already takes neither shapes nor params nor weights"
            )
        return source
    kind = _kind(source)
    if params and kind != "relax":
        raise ModelError("params are for Relax modules; this source brings its own weights")
    if kind == "onnx":
        from .onnx import load_onnx

        return load_onnx(source, shapes=shapes, weights=weights)
    if kind == "torch":
        from .torch import load_torch

        return load_torch(source, shapes=shapes, weights=weights)
    from .relax import load_relax

    return load_relax(source, shapes=shapes, params=params, weights=weights)


def _kind(source: Any) -> str:
    if is_checkpoint(source):
        raise ModelError(
            f"'{os.fspath(source)}' holds weights without a graph; load the model, and give this "
            "as its weights"
        )
    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        return "onnx"
    # By class name: importing PyTorch only to ask costs seconds, and it may not be installed.
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(source).__mro__}
    if any(name.startswith("onnx") and name.endswith(".ModelProto") for name in names):
        return "onnx"
    if any(name.startswith("torch.export") and name.endswith("ExportedProgram") for name in names):
        return "torch"
    if any(name.startswith("tvm.ir") and name.endswith("IRModule") for name in names):
        return "relax"
    if hasattr(source, "model_proto"):
        raise ModelError("pass the program's model_proto, or save it and pass the path")
    if any(name == "torch.nn.modules.module.Module" for name in names):
        raise ModelError("a torch.nn.Module has to be exported first: torch.export.export(m, args)")
    raise ModelError(
        f"cannot load a {type(source).__name__}; pass an ONNX file, a torch.export program or a "
        "Relax module"
    )
