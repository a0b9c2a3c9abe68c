"""The weights of a loaded `Model`: `R.matmul` with [K, M], `R.nn.conv2d` with OIHW."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..dtypes import is_float
from ..model import Model
from .activations import model_energies
from .sites import PrunableLayer, Site


def _rows_of_matmul(stored: np.ndarray) -> np.ndarray:
    return stored.T[:, :, None]


def _rows_of_conv(stored: np.ndarray) -> np.ndarray:
    return stored.reshape(*stored.shape[:2], -1)


class ModelWeights:
    """What can be pruned of a model, and what cannot."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.notes: tuple[str, ...] = ()
        self.values: dict[str, np.ndarray] = {}
        self.refused: dict[str, str] = {}
        self.sites: list[Site] = []
        for name, op, groups in self._uses():
            if name not in self.values:
                self._add(name, op, groups)

    def _uses(self) -> Iterable[tuple[str, str, int]]:
        import tvm
        from tvm import relax

        found: list[tuple[str, str, int]] = []

        def visit(expr: Any) -> None:
            if not isinstance(expr, relax.Call) or not isinstance(expr.op, tvm.ir.Op):
                return
            op = {"relax.matmul": "MatMul", "relax.nn.conv2d": "Conv"}.get(expr.op.name)
            if op is None or not isinstance(expr.args[1], relax.Var):
                return
            var = expr.args[1]
            name = str(getattr(var, "name", None) or var.name_hint)
            if name in self.model.params:
                groups = int(expr.attrs.groups) if op == "Conv" else 1
                found.append((name, op, groups))

        relax.analysis.post_order_visit(self.model.mod["main"], visit)
        return found

    def _add(self, param: str, op: str, groups: int) -> None:
        array = np.array(self.model.params[param], order="C")
        layer = self.model.layer_names.get(param, param)
        if not is_float(array.dtype):
            self.refused[layer] = f"its weight is {array.dtype}"
        elif op == "MatMul" and array.ndim != 2:
            self.refused[layer] = f"its weight has {array.ndim} dimensions"
        else:
            arrange = _rows_of_matmul if op == "MatMul" else _rows_of_conv
            self.values[param] = array
            found = PrunableLayer(layer, op, array.shape, groups)
            self.sites.append(Site(found, param, arrange(array), arrange))

    def energies(self, calibration: Any) -> dict[str, np.ndarray]:
        """Sum up the squares of every layer's inputs: [channels, taps] by layer."""
        return model_energies(self.model, calibration)

    def close(self) -> Model:
        """Return a copy of the model with the weights as they are now."""
        return dataclasses.replace(self.model, params={**self.model.params, **self.values})
