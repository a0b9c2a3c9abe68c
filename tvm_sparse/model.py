"""A loaded model: a Relax function, the values of its named weights, and the user's names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TensorSpec:
    """One input or output as the user knows it; a symbolic dimension is its name."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class Model:
    """A model in the form that every later phase works on.

    Attributes
    ----------
    mod : tvm.IRModule
        `main` takes the inputs, then one parameter per weight; its attribute `num_input` counts the
        inputs. Scalars and integer constants may stand in the body; every floating-point array of
        one dimension or more is a parameter.
    params : mapping of str to numpy.ndarray
        The value of each weight parameter, by the parameter's name in `mod`.
    layer_names : mapping of str to str
        The user's layer name of each weight parameter (the ONNX node, or the PyTorch module path).
    inputs, outputs : tuple of TensorSpec
        In calling order, with the user's names.
    source : str
        Where it came from, for reports.
    """

    mod: Any
    params: Mapping[str, np.ndarray]
    layer_names: Mapping[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    source: str = ""
    notes: tuple[str, ...] = field(default=())

    def digest(self) -> str:
        """Hash the inputs and the weights, values too: what ties a plan to its model."""
        state = hashlib.sha256()
        for spec in self.inputs:
            state.update(f"{spec.name}:{spec.dtype}:{spec.shape};".encode())
        for name in sorted(self.params):
            value = np.ascontiguousarray(self.params[name])
            state.update(f"{name}:{value.dtype}:{value.shape};".encode())
            # As bytes: bfloat16 has no buffer that Python knows.
            state.update(value.reshape(-1).view(np.uint8).data if value.size else b"")
        return state.hexdigest()[:16]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters, dense."""
        return sum(int(value.nbytes) for value in self.params.values())
