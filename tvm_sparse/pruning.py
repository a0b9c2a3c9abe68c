"""Magnitude pruning: set the smallest weights of matmuls and convolutions to zero.

This is the simplest pruning there is, made for trying the compiler and for measuring it; it does
not retrain. Biases, normalisations and embedding tables are never touched.

How much is cut is exact. A weight is divided into units (elements, blocks, vectors or channels,
after the pattern), and of `n` units ``round(sparsity * n)`` go: those of the smallest magnitude,
where units that are zero already count among the cut ones. With ``scope="layer"`` `n` counts the
units of one layer, with ``scope="global"`` those of all layers together. Where several units share
the magnitude at the border, which of them go is drawn at random from `seed`. NaN and Inf count as
the largest magnitudes.

Patterns
--------
unstructured
    Units are single elements, ranked by absolute value.
N:M
    In every group of M input channels of a row (and tap) the N largest magnitudes stay; a last
    group of fewer than M keeps up to N as well. The pattern itself says how much goes.
block:RxC
    Units are blocks of R output channels by C columns, ranked by mean square; the columns of a
    convolution are (input channel, tap), taps innermost. Blocks at the edges are smaller.
vector:V
    Blocks of V output channels by one column.
channel
    Units are whole output channels. They become zeros; the shapes stay.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

import numpy as np
import onnx
from onnx import numpy_helper

from .dtypes import is_float
from .errors import ModelError, SparseError
from .files import read_onnx
from .model import Model

Scope = Literal["global", "layer"]
AnyModel = TypeVar("AnyModel", onnx.ModelProto, Model)

PATTERNS = ("unstructured", "N:M", "block:RxC", "vector:V", "channel")
DEFAULT_SPARSITY = 0.9


@dataclass(frozen=True)
class Pattern:
    """A pattern as it is named in a call, read.

    Attributes
    ----------
    kind : str
        "unstructured", "n:m", "block" or "channel".
    size : tuple of int
        (N, M), or the rows and columns of a block; empty otherwise.
    """

    kind: Literal["unstructured", "n:m", "block", "channel"]
    size: tuple[int, ...] = ()


def parse_pattern(text: str) -> Pattern:
    """Read the name of a pattern.

    Raises
    ------
    SparseError
        When it is none that this package prunes to.
    """
    if text == "unstructured":
        return Pattern("unstructured")
    if text == "channel":
        return Pattern("channel")
    if text.startswith("tile-wise:"):
        raise SparseError(
            "tile-wise pruning works in stages with retraining and is not part of this version; "
            "use block:RxC or channel"
        )
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(found[1]), int(found[2])
        if not 0 < n < m:
            raise SparseError(
                f"pattern '{text}' makes no sense: N:M keeps N of every M, with N below M"
            )
        return Pattern("n:m", (n, m))
    if found := re.fullmatch(r"block:(\d+)x(\d+)", text) or re.fullmatch(r"vector:(\d+)", text):
        size = int(found[1]), int(found[2]) if found.re.groups == 2 else 1
        if min(size) < 1:
            raise SparseError(f"pattern '{text}' makes no sense: a block has at least one element")
        return Pattern("block", size)
    raise SparseError(f"unknown pattern '{text}'; there are {', '.join(PATTERNS)}")


@dataclass(frozen=True)
class PrunableLayer:
    """A layer whose weight can be pruned.

    Attributes
    ----------
    name : str
        The ONNX node (several, joined by a comma, when they share the weight).
    op : str
        "Conv", "Gemm" or "MatMul".
    shape : tuple of int
        The weight as it is stored.
    groups : int
        Groups of a convolution.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    groups: int = 1

    @property
    def is_depthwise(self) -> bool:
        """A convolution with one input channel a group."""
        return self.op == "Conv" and self.groups > 1 and self.shape[1] == 1


@dataclass(frozen=True)
class LayerCut:
    """What pruning did to one layer: zeros before and after, of `size` elements."""

    layer: PrunableLayer
    size: int
    zeros_before: int
    zeros_after: int

    @property
    def sparsity(self) -> float:
        """Share of zeros afterwards; 0 for a weight without elements."""
        return self.zeros_after / self.size if self.size else 0.0


@dataclass(frozen=True)
class Pruning:
    """A pruned model, and the report of what was cut.

    Attributes
    ----------
    model : onnx.ModelProto or Model
        Of the kind that went in (a path gives a ModelProto).
    layers : tuple of LayerCut
        Every pruned layer, in the order of the graph.
    kept : mapping of str to str
        Layers that were left alone, with the reason.
    notes : tuple of str
        What else a person should know, for example a `skip` that matches nothing.
    """

    model: Any
    pattern: str
    layers: tuple[LayerCut, ...]
    kept: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Share of zeros over all pruned layers."""
        size = sum(cut.size for cut in self.layers)
        return sum(cut.zeros_after for cut in self.layers) / size if size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the model."""
        return {
            "pattern": self.pattern,
            "sparsity": self.sparsity,
            "layers": [
                {**dataclasses.asdict(cut.layer), "size": cut.size, "zeros": cut.zeros_after}
                for cut in self.layers
            ],
            "kept": dict(self.kept),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        width = max([len(cut.layer.name) for cut in self.layers] + [5])
        lines = [f"{'layer':<{width}}  {'op':<6}  {'shape':<18}  zeros before   after"]
        for cut in self.layers:
            before = cut.zeros_before / cut.size if cut.size else 0.0
            shape = "x".join(map(str, cut.layer.shape))
            lines.append(
                f"{cut.layer.name:<{width}}  {cut.layer.op:<6}  {shape:<18}  "
                f"{before:>11.1%}  {cut.sparsity:>6.1%}"
            )
        lines.append(f"{len(self.layers)} layers pruned to {self.sparsity:.1%} zeros in all")
        lines += [f"left alone: {name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class _Site:
    """One weight: `view` is [rows, input channels, taps] and writes into what `values` holds."""

    layer: PrunableLayer
    root: str
    view: np.ndarray


def prune(
    model: str | os.PathLike[str] | AnyModel,
    pattern: str = "unstructured",
    sparsity: float | None = None,
    scope: Scope = "global",
    skip: Sequence[str] = (),
    seed: int = 0,
) -> Any:
    """Set the smallest weights to zero; the model that was given is not changed.

    Parameters
    ----------
    model : path, onnx.ModelProto or Model
        What to prune.
    pattern : str
        "unstructured", "N:M" (for example "2:4"), "block:RxC", "vector:V" or "channel"; see the
        module's text for what each one means.
    sparsity : float, optional
        Share of zeros to reach, from 0 to below 1; 0.9 when it is not given. N:M fixes it: leave
        it out there.
    scope : {"global", "layer"}
        Rank units over all layers together, or each layer on its own. N:M is the same in both.
    skip : sequence of str
        Names or patterns (``fnmatch``) of layers to leave alone.
    seed : int
        Decides between units of equal magnitude.

    Returns
    -------
    onnx.ModelProto or Model
        A pruned copy, of the kind that went in (a path gives a ModelProto).

    Raises
    ------
    SparseError
        When the pattern, the sparsity or the scope makes no sense.
    ModelError
        When the model cannot be read, or holds no weight that can be pruned.
    """
    return prune_with_report(model, pattern, sparsity, scope, skip, seed).model


def prune_with_report(
    model: str | os.PathLike[str] | AnyModel,
    pattern: str = "unstructured",
    sparsity: float | None = None,
    scope: Scope = "global",
    skip: Sequence[str] = (),
    seed: int = 0,
) -> Pruning:
    """Prune as `prune` does, and return the model together with what was cut and what was not."""
    parsed = parse_pattern(pattern)
    share = _share(parsed, pattern, sparsity)
    if scope not in ("global", "layer"):
        raise SparseError(f"unknown scope '{scope}'; there are global and layer")
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    weights = _open(model)
    kept = dict(weights.refused)
    chosen: list[_Site] = []
    for site in weights.sites:
        if match := next((p for p in skip if _matches(site.layer.name, p)), None):
            kept[site.layer.name] = f"skip names it ('{match}')"
        else:
            chosen.append(site)
    if not weights.sites:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in kept.items())
        raise ModelError(
            "the model has no weight of a Conv, Gemm or MatMul that can be pruned"
            + (f" ({reasons})" if reasons else "")
        )
    before = [_zeros(site.view) for site in chosen]
    _cut([site.view for site in chosen], parsed, share, scope, np.random.default_rng(seed))
    layers = tuple(
        LayerCut(site.layer, site.view.size, zeros, _zeros(site.view))
        for site, zeros in zip(chosen, before, strict=True)
    )
    names = [site.layer.name for site in weights.sites]
    notes = tuple(
        f"skip '{p}' matches no layer" for p in skip if not any(_matches(n, p) for n in names)
    )
    notes += tuple(
        f"layer '{cut.layer.name}' has no nonzero weight left; scope='layer' spreads the cut evenly"
        for cut in layers
        if cut.size and cut.zeros_after == cut.size > cut.zeros_before
    )
    return Pruning(weights.close(), pattern, layers, kept, notes)


def prunable_layers(model: str | os.PathLike[str] | AnyModel) -> tuple[PrunableLayer, ...]:
    """List the layers that `prune` would touch, in the order of the graph."""
    return tuple(site.layer for site in _open(model).sites)


def _matches(name: str, pattern: str) -> bool:
    return any(part == pattern or fnmatchcase(part, pattern) for part in (name, *name.split(", ")))


def _zeros(view: np.ndarray) -> int:
    return int(view.size - np.count_nonzero(view))


def _share(pattern: Pattern, text: str, sparsity: float | None) -> float:
    if sparsity is not None and not 0.0 <= sparsity < 1.0:
        raise SparseError(
            f"the sparsity is the share of zeros, from 0 to below 1; {sparsity:g} is outside"
        )
    if pattern.kind != "n:m":
        return DEFAULT_SPARSITY if sparsity is None else sparsity
    implied = 1.0 - pattern.size[0] / pattern.size[1]
    if sparsity is not None and not math.isclose(sparsity, implied, abs_tol=1e-6):
        raise SparseError(
            f"pattern {text} leaves {implied:.4g} zero by itself, so a sparsity of {sparsity:g} "
            "cannot be reached; leave it out"
        )
    return implied


# ---------------------------------------------------------------------------------------------
# Which units go
# ---------------------------------------------------------------------------------------------


def _cut(
    views: Sequence[np.ndarray],
    pattern: Pattern,
    share: float,
    scope: Scope,
    rng: np.random.Generator,
) -> None:
    """Write zeros into weights of the form [rows, input channels, taps]."""
    if pattern.kind == "n:m":
        n, m = pattern.size
        for view in views:
            view[_outside_n_of_m(_magnitude(view), n, m, rng)] = 0
        return
    scores = [_scores(view, pattern) for view in views]
    if scope == "layer":
        cuts = [_smallest(score.ravel(), share, rng).reshape(score.shape) for score in scores]
    else:
        together = np.concatenate([score.ravel() for score in scores] or [np.zeros(0)])
        parts = np.split(
            _smallest(together, share, rng), np.cumsum([score.size for score in scores])[:-1]
        )
        cuts = [part.reshape(score.shape) for part, score in zip(parts, scores, strict=False)]
    for view, cut in zip(views, cuts, strict=True):
        view[_elements(cut, view.shape, pattern)] = 0


def _magnitude(view: np.ndarray) -> np.ndarray:
    magnitude = np.abs(view if view.dtype in (np.float32, np.float64) else view.astype(np.float32))
    magnitude[np.isnan(magnitude)] = np.inf
    return magnitude


def _scores(view: np.ndarray, pattern: Pattern) -> np.ndarray:
    """Rank of every unit: [rows, channels, taps], [block rows, block columns] or [rows]."""
    magnitude = _magnitude(view)
    if pattern.kind == "unstructured":
        return magnitude
    matrix = magnitude.reshape(view.shape[0], -1)
    if not matrix.size:
        return np.zeros((0, 0) if pattern.kind == "block" else view.shape[0])
    squares = np.square(matrix, dtype=np.float64)
    if pattern.kind == "channel":
        return squares.mean(axis=1)
    rows, columns = pattern.size
    row_starts = np.arange(0, matrix.shape[0], rows)
    column_starts = np.arange(0, matrix.shape[1], columns)
    sums = np.add.reduceat(np.add.reduceat(squares, row_starts, 0), column_starts, 1)
    heights = np.diff(row_starts, append=matrix.shape[0])
    widths = np.diff(column_starts, append=matrix.shape[1])
    return sums / np.outer(heights, widths)


def _elements(cut: np.ndarray, shape: tuple[int, ...], pattern: Pattern) -> np.ndarray:
    """Spread a decision over units to the elements of [rows, channels, taps]."""
    if pattern.kind == "channel":
        return np.broadcast_to(cut[:, None, None], shape)
    if pattern.kind == "block" and cut.size:
        rows, columns = shape[0], shape[1] * shape[2]
        wide = np.repeat(np.repeat(cut, pattern.size[0], 0), pattern.size[1], 1)
        return wide[:rows, :columns].reshape(shape)
    return cut.reshape(shape) if cut.size else np.zeros(shape, bool)


def _smallest(scores: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Mark the ``round(share * size)`` smallest of a vector."""
    count = round(share * scores.size)
    if count == 0:
        return np.zeros(scores.shape, bool)
    border = np.partition(scores, count - 1)[count - 1]
    cut = scores < border
    if border == 0:
        return scores == 0
    ties = np.flatnonzero(scores == border)
    missing = count - int(np.count_nonzero(cut))
    cut[ties if missing == ties.size else rng.permutation(ties)[:missing]] = True
    return cut


def _outside_n_of_m(magnitude: np.ndarray, n: int, m: int, rng: np.random.Generator) -> np.ndarray:
    """Mark all but the `n` largest in every group of `m` along axis 1."""
    rows, channels, taps = magnitude.shape
    groups = -(-channels // m)
    # -1 ranks below every magnitude, so that padding never takes a place.
    padded = np.full((rows, groups * m, taps), -1.0, magnitude.dtype)
    padded[:, :channels] = magnitude
    grouped = padded.reshape(rows, groups, m, taps)
    order = rng.permutation(m)
    ranked = np.argsort(grouped[:, :, order], axis=2, kind="stable")
    cut = np.ones(grouped.shape, bool)
    np.put_along_axis(cut, order[ranked[:, :, m - n :]], False, axis=2)
    return cut.reshape(padded.shape)[:, :channels]


# ---------------------------------------------------------------------------------------------
# Where the weights are
# ---------------------------------------------------------------------------------------------


def _open(model: Any) -> _OnnxWeights | _ModelWeights:
    if isinstance(model, Model):
        return _ModelWeights(model)
    if isinstance(model, onnx.ModelProto):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return _OnnxWeights(copy)
    if isinstance(model, (str, os.PathLike)):
        return _OnnxWeights(read_onnx(model))
    raise ModelError(
        "pruning takes a path, an onnx.ModelProto or a loaded model; "
        f"this is a {type(model).__name__}"
    )


class _ModelWeights:
    """The weights of a loaded `Model`: `R.matmul` with [K, M], `R.nn.conv2d` with OIHW."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.values: dict[str, np.ndarray] = {}
        self.refused: dict[str, str] = {}
        self.sites: list[_Site] = []
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
            view = array.T[:, :, None] if op == "MatMul" else array.reshape(*array.shape[:2], -1)
            self.values[param] = array
            self.sites.append(_Site(PrunableLayer(layer, op, array.shape, groups), param, view))

    def close(self) -> Model:
        return dataclasses.replace(self.model, params={**self.model.params, **self.values})


# Element types whose magnitude means something.
_FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
}


class _OnnxWeights:
    """The weights of an ONNX graph that it owns, found through Identity, Transpose, Reshape."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
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
        self.sites: list[_Site] = []
        self._collect()

    def _collect(self) -> None:
        uses: dict[str, list[tuple[onnx.NodeProto, int, str]]] = {}
        for node in self.model.graph.node:
            if node.op_type in ("Identity", "Transpose", "Reshape"):
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
        """Name layers whose weight is no constant; only a MatMul does without one as a rule."""
        for node in self.model.graph.node:
            if node.op_type in ("Conv", "Gemm") and not self._root(node.input[1]):
                maker = self.producers.get(node.input[1])
                origin = f"computed by a {maker.op_type}" if maker else "an input of the model"
                self.refused[_name(node)] = f"its weight is {origin}"

    def _root(self, name: str) -> str:
        """Follow rearrangements back to a constant; empty when there is none."""
        while name not in self.tensors and name not in self.sparse:
            node = self.producers.get(name)
            if node is None or node.op_type not in ("Identity", "Transpose", "Reshape"):
                return ""
            name = node.input[0]
        return name

    def _site(self, name: str, root: str, place: tuple[onnx.NodeProto, int, str]) -> _Site | str:
        node, index, operand = place
        tensor = self.sparse[root].values if root in self.sparse else self.tensors[root]
        if tensor.data_type not in _FLOATS:
            return f"its weight is {onnx.TensorProto.DataType.Name(tensor.data_type).lower()}"
        array = self._array(root)
        shape = array.shape
        weight = self._rearranged(operand, array)
        if weight is None or not np.may_share_memory(weight, array):
            return "its weight is rearranged in a way that cannot be followed"
        if node.op_type == "Conv":
            if weight.ndim < 3:
                return f"its weight has {weight.ndim} dimensions"
            view = weight.reshape(*weight.shape[:2], -1)
        elif weight.ndim != 2:
            return f"its weight has {weight.ndim} dimensions"
        else:
            flag = {a.name: a.i for a in node.attribute if a.name in ("transA", "transB")}
            # Output features come first: as columns of the second operand, as rows of the first.
            turned = bool(flag.get("transB")) if index == 1 else not flag.get("transA")
            view = (weight if turned else weight.T)[:, :, None]
        if not np.may_share_memory(view, array):
            return "its weight is rearranged in a way that cannot be followed"
        self.values[root] = array
        groups = next((int(a.i) for a in node.attribute if a.name == "group"), 1)
        return _Site(PrunableLayer(name, node.op_type, shape, groups), root, view)

    def _array(self, root: str) -> np.ndarray:
        try:
            if root in self.sparse:
                return _densify(self.sparse[root])
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


def _densify(tensor: onnx.SparseTensorProto) -> np.ndarray:
    values = numpy_helper.to_array(tensor.values)
    indices = numpy_helper.to_array(tensor.indices)
    array = np.zeros(tuple(tensor.dims), values.dtype)
    if indices.ndim == 1:
        array.reshape(-1)[indices] = values
    else:
        array[tuple(indices.T)] = values
    return array


def _name(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


def _is_weight(node: onnx.NodeProto, index: int) -> bool:
    return (node.op_type == "Conv" and index == 1) or (
        node.op_type in ("Gemm", "MatMul") and index in (0, 1)
    )
