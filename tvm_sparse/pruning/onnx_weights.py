"""The weights of an ONNX graph, found through Identity, Transpose and Reshape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ..errors import ModelError
from ..frontends.onnx_file import densify
from ..frontends.onnx_overlay import fold_masks_of, masked_notes
from ..frontends.onnx_quantised import quantised_weights
from .activations import Tap, Window, onnx_energies
from .sites import PrunableLayer, Site

Place = tuple[onnx.NodeProto, int, str]
Arrange = Callable[[np.ndarray], np.ndarray]

# Element types whose magnitude means something.
FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
}


_REARRANGING = ("Identity", "Transpose", "Reshape")


class OnnxWeights:
    """What can be pruned of an ONNX model that it owns, and what cannot.

    Masks that stand in its graph are multiplied into the weights first.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.notes = tuple(masked_notes(fold_masks_of(model)))
        graph = model.graph
        self.producers = {out: node for node in graph.node for out in node.output if out}
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.tensors.update(
            {
                node.output[0]: attribute.t
                for node in graph.node
                if node.op_type == "Constant"
                for attribute in node.attribute
                if attribute.name == "value"
            }
        )
        self.sparse = {tensor.values.name: tensor for tensor in graph.sparse_initializer}
        self.values: dict[str, np.ndarray] = {}
        self.refused: dict[str, str] = {}
        self.sites: list[Site] = []
        self._collect()

    def _collect(self) -> None:
        uses: dict[str, list[Place]] = {}
        for node in self.model.graph.node:
            if node.op_type in _REARRANGING:
                continue
            for index, name in enumerate(node.input):
                if root := self._root(name):
                    uses.setdefault(root, []).append((node, index, name))
        for root, places in uses.items():
            weights = [place for place in places if _is_weight(place[0], place[1])]
            if not weights:
                continue
            name = ", ".join(dict.fromkeys(_name(node) for node, _, _ in weights))
            strangers = [node for node, index, _ in places if not _is_weight(node, index)]
            if strangers:
                self.refused[name] = (
                    f"its weight '{root}' also feeds the {strangers[0].op_type} "
                    f"'{_name(strangers[0])}'"
                )
                continue
            site = self._site(name, root, weights[0])
            if isinstance(site, str):
                self.refused[name] = site
            else:
                self.sites.append(site)
        self._refuse_computed()

    def _refuse_computed(self) -> None:
        """Name layers whose weight is no float constant; a MatMul does without one as a rule."""
        for name, how in quantised_weights(self.model.graph).items():
            self.refused[name] = f"its weight is quantised ({how}); prune before quantising"
        for node in self.model.graph.node:
            if node.op_type not in ("Conv", "Gemm") or _name(node) in self.refused:
                continue
            if not self._root(node.input[1]):
                maker = self.producers.get(node.input[1])
                origin = f"computed by a {maker.op_type}" if maker else "an input of the model"
                self.refused[_name(node)] = f"its weight is {origin}"

    def _root(self, name: str) -> str:
        """Follow rearrangements back to a constant; empty when there is none."""
        while name not in self.tensors and name not in self.sparse:
            node = self.producers.get(name)
            if node is None or node.op_type not in _REARRANGING:
                return ""
            name = node.input[0]
        return name

    def _site(self, name: str, root: str, place: Place) -> Site | str:
        tensor = self.sparse[root].values if root in self.sparse else self.tensors[root]
        if tensor.data_type not in FLOATS:
            return f"its weight is {onnx.TensorProto.DataType.Name(tensor.data_type).lower()}"
        node, _, operand = place
        array = self._array(root)
        weight = self._rearranged(operand, array)
        lost = "its weight is rearranged in a way that cannot be followed"
        if weight is None or not np.may_share_memory(weight, array):
            return lost
        if weight.ndim < 3 if node.op_type == "Conv" else weight.ndim != 2:
            return f"its weight has {weight.ndim} dimensions"
        arrange = self._arrangement(place)
        view = arrange(array)
        if not np.may_share_memory(view, array):
            return lost
        self.values[root] = array
        groups = int(attribute_of(node, "group", 1))
        return Site(PrunableLayer(name, node.op_type, array.shape, groups), root, view, arrange)

    def _arrangement(self, place: Place) -> Arrange:
        """Return what makes [rows, input channels, taps] of the stored weight."""
        node, index, operand = place

        def arrange(stored: np.ndarray) -> np.ndarray:
            weight = self._rearranged(operand, stored)
            assert weight is not None, "a site was made of it"
            if node.op_type == "Conv":
                return weight.reshape(*weight.shape[:2], -1)
            # Output features come first: as columns of the second operand, as rows of the first.
            turned = (
                bool(attribute_of(node, "transB", 0))
                if index == 1
                else not attribute_of(node, "transA", 0)
            )
            return (weight if turned else weight.T)[:, :, None]

        return arrange

    def _array(self, root: str) -> np.ndarray:
        try:
            if root in self.sparse:
                return densify(self.sparse[root], None)
            return np.array(numpy_helper.to_array(self.tensors[root]), order="C")
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelError(f"the weight '{root}' cannot be read: {lines[0]}") from None

    def _rearranged(self, name: str, array: np.ndarray) -> np.ndarray | None:
        if name in self.tensors or name in self.sparse:
            return array
        node = self.producers[name]
        inner = self._rearranged(node.input[0], array)
        if inner is None or node.op_type == "Identity":
            return inner
        if node.op_type == "Transpose":
            order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
            return inner.transpose(order)
        target = self.tensors.get(node.input[1])
        if target is None:
            return None
        keep_zero = any(a.name == "allowzero" and a.i for a in node.attribute)
        sizes = [int(size) for size in numpy_helper.to_array(target)]
        shape = [
            inner.shape[axis] if size == 0 and not keep_zero else size
            for axis, size in enumerate(sizes)
        ]
        return inner.reshape(shape)

    def energies(self, calibration: Any) -> dict[str, np.ndarray]:
        """Sum up the squares of every layer's inputs: [channels, taps] by layer."""
        roots = {site.root: site for site in self.sites}
        taps = []
        for node in self.model.graph.node:
            for index, name in enumerate(node.input):
                site = roots.get(self._root(name)) if _is_weight(node, index) else None
                if site is not None:
                    taps.append(_tap(node, index, site))
        return onnx_energies(self.model, taps, calibration)

    def masks(self) -> dict[str, np.ndarray]:
        """Say where the weights are nonzero, in arrays of bool named as PyTorch's prune does."""
        return {f"{root}_mask": array != 0 for root, array in self.values.items()}

    def close(self) -> onnx.ModelProto:
        """Write the arrays back; a pruned `sparse_initializer` becomes a dense one."""
        graph = self.model.graph
        for root, array in self.values.items():
            if root in self.sparse:
                graph.initializer.append(numpy_helper.from_array(array, root))
            else:
                name = self.tensors[root].name
                self.tensors[root].CopyFrom(numpy_helper.from_array(array, name))
        left = [tensor for name, tensor in self.sparse.items() if name not in self.values]
        del graph.sparse_initializer[:]
        graph.sparse_initializer.extend(left)
        return self.model


def _tap(node: onnx.NodeProto, index: int, site: Site) -> Tap:
    data = node.input[1 - index]
    if node.op_type != "Conv":
        turned = node.op_type == "Gemm" and bool(
            attribute_of(node, ("transA", "transB")[1 - index], 0)
        )
        return Tap(site.layer.name, data, axis=-1 if (index == 1) != turned else -2)
    kernel = site.layer.shape[2:]
    strides = tuple(attribute_of(node, "strides", (1,) * len(kernel)))
    dilations = tuple(attribute_of(node, "dilations", (1,) * len(kernel)))
    pads = tuple(attribute_of(node, "pads", (0,) * (2 * len(kernel))))
    sides = tuple(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
    auto = attribute_of(node, "auto_pad", b"NOTSET").decode()
    return Tap(site.layer.name, data, Window(kernel, strides, dilations, sides, auto))


def attribute_of(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Return the value of an attribute, or what ONNX takes when it is left out."""
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def _name(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


def _is_weight(node: onnx.NodeProto, index: int) -> bool:
    return (node.op_type == "Conv" and index == 1) or (
        node.op_type in ("Gemm", "MatMul") and index in (0, 1)
    )
