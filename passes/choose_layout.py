"""Decide which operators keep their activations in panels, and which take them in rows.

Operators that can do both are vertices of a graph; where neighbours differ, activations are
converted. The cheapest choice is a minimum cut (V. Kolmogorov and R. Zabih, "What Energy Functions
Can Be Minimized via Graph Cuts?", PAMI 26(2), 2004): on one side of it everything is in panels, on
the other in rows, each vertex is cut off from the side that costs it more, and a value that both
sides read is converted once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from tvm import relax

from ..ops.base import product
from ..panels import Panels
from ..schedules.x86 import cost
from ..schedules.x86.panels_attention import supports_panels
from ..targets import X86Machine
from .collect_weights import FusedSite
from .fuse_elementwise import elementwise_chains
from .fuse_epilogue import Body, FusedEpilogue
from .match_attention import Attention, match_attention
from .rewrite_main import call_of, dtype_of, first_of_slice, static_shape

# Panels are as wide as the usual register tile.
_VECTORS = 4

# A layer reads one and writes one such tensor, weights stream by, and others use L3, too.
_SHARE_OF_L3 = 6
_MOST_PARTS = 32

Kind = Literal["weight", "norm", "attention", "elementwise", "slice", "concat", "view"]


@dataclass(frozen=True)
class PanelOp:
    """An operator of `main` that can take and give panels.

    Attributes
    ----------
    kind : Kind
        What it is; "slice" takes some neighbouring features, "concat" puts features behind each
        other, and "view" is a reshape that leaves the features alone.
    members : frozenset of int
        The bindings that it stands for.
    result : int
        The binding whose value it gives.
    inputs : tuple of relax.Var
        What it reads in panels.
    gain_us : float
        Microseconds that it saves on panels, negative where it is slower.
    what : Any
        The `FusedSite`, `Attention` or `FusedEpilogue` of a chain, or a slice's first feature; None
        for others.
    """

    kind: Kind
    members: frozenset[int]
    result: int
    inputs: tuple[Any, ...]
    gain_us: float
    what: Any = None


@dataclass(frozen=True)
class Layout:
    """The operators that work on panels, by the position of their results.

    Attributes
    ----------
    ops : mapping of int to PanelOp
    panels : mapping of int to Panels
        How the tokens of one part are cut for each.
    together : sequence of tuple of int
        Operators with a weight each that read the same activations and whose results only one
        attention reads: they may be one.
    parts : int
        Sequences never meet in these operators, so a batch whose activations are large runs part by
        part through all of them, depth first.
    """

    ops: Mapping[int, PanelOp] = field(default_factory=dict)
    panels: Mapping[int, Panels] = field(default_factory=dict)
    together: Sequence[tuple[int, ...]] = ()
    parts: int = 1

    def takes_panels(self, fused_site: FusedSite) -> bool:
        """Whether a weight's operator works on panels."""
        op = self.ops.get(fused_site.fused.result)
        return op is not None and op.kind == "weight"


def panels_of(tokens: int, machine: X86Machine) -> Panels | None:
    """Cut tokens in panels; None where they do not fill a vector, and rows are as good."""
    return _cut(tokens, machine) if tokens >= machine.lanes else None


def _cut(tokens: int, machine: X86Machine) -> Panels:
    return Panels(tokens, _VECTORS, machine.lanes)


def choose_layout(
    body: Body,
    sites: Sequence[FusedSite],
    gains: Mapping[str, float],
    machine: X86Machine,
) -> Layout:
    """Choose the layout of activations.

    Parameters
    ----------
    body : Body
        The model's `main`.
    sites : sequence of FusedSite
        The operators with weights.
    gains : mapping of str to float
        Microseconds that a site's kernel saves on panels, by binding; sites that are not there
        take rows.
    machine : X86Machine
        Gives the vector width.
    """
    # Without a product in panels nothing gains.
    ops = _candidates(body, sites, gains, machine) if gains else []
    chosen = _cheapest(body, ops, machine)
    parts = _parts(body, chosen, machine)
    panels = {op.result: _cut(_tokens(body, op) // parts, machine) for op in chosen}
    return Layout({op.result: op for op in chosen}, panels, _groups(body, chosen), parts)


def _tokens(body: Body, op: PanelOp) -> int:
    shape = static_shape(body.bindings[op.result][0])
    assert shape is not None
    return int(product(shape[:-1]))


def _parts(body: Body, chosen: Sequence[PanelOp], machine: X86Machine) -> int:
    """Tell in how many parts a batch of sequences runs, so that its activations stay in L3.

    One, unless every operator works on the same sequences.
    """
    geometries = [op.what.geometry for op in chosen if op.kind == "attention"]
    batches = {(geometry.batch, geometry.tokens) for geometry in geometries}
    if len(batches) != 1:
        return 1
    [(batch, tokens)] = batches
    if {_tokens(body, op) for op in chosen} != {batch * tokens}:
        return 1
    shapes = [static_shape(body.bindings[op.result][0]) or (1,) for op in chosen]
    widest = 4 * max(int(product(shape)) for shape in shapes)
    fitting = [
        parts
        for parts in range(1, min(batch, _MOST_PARTS) + 1)
        if batch % parts == 0
        and batch // parts * tokens >= machine.lanes
        and widest / parts <= machine.l3_bytes / _SHARE_OF_L3
    ]
    return fitting[0] if fitting else 1


def _candidates(
    body: Body, sites: Sequence[FusedSite], gains: Mapping[str, float], machine: X86Machine
) -> list[PanelOp]:
    found: dict[int, PanelOp] = {}
    taken: set[int] = set()

    def add(op: PanelOp) -> None:
        if not all(isinstance(variable, relax.Var) for variable in op.inputs):
            return
        shapes = [static_shape(body.bindings[op.result][0]), *map(static_shape, op.inputs)]
        if not all(shape is not None and len(shape) >= 2 for shape in shapes):
            return
        tokens = {product(shape[:-1]) for shape in shapes if shape is not None}
        if len(tokens) == 1 and panels_of(tokens.pop(), machine) and not taken & op.members:
            found[op.result] = op
            taken.update(op.members)

    for fused_site in sites:
        gain = gains.get(fused_site.site.binding)
        fused = fused_site.fused
        if gain is not None:
            inputs = (fused_site.data, *fused.tensors)
            add(PanelOp("weight", fused.members, fused.result, inputs, gain, fused_site))
        taken.update(fused.members)
    for attention in match_attention(body):
        if supports_panels(attention.geometry, machine.lanes):
            add(_attention_op(attention, machine))
    for chain in elementwise_chains(body, taken):
        add(_elementwise_op(body, chain, machine))
    for index in range(len(body.bindings)):
        op = None if index in taken else _simple_op(body, index, machine)
        if op is not None:
            add(op)
    return [found[index] for index in sorted(found)]


def _attention_op(attention: Attention, machine: X86Machine) -> PanelOp:
    a, g = attention, attention.geometry
    gain = cost.attention_gain(g.batch * g.tokens * g.heads * g.depth, machine)
    return PanelOp("attention", a.members, a.result, (a.query, a.key, a.value), gain, a)


def _elementwise_op(body: Body, chain: FusedEpilogue, machine: X86Machine) -> PanelOp:
    shape = static_shape(body.bindings[chain.result][0])
    assert shape is not None
    gain = cost.elementwise_gain(chain.epilogue, product(shape[:-1]), shape[-1], machine)
    return PanelOp("elementwise", chain.members, chain.result, chain.tensors, gain, chain)


def _simple_op(body: Body, index: int, machine: X86Machine) -> PanelOp | None:
    """Recognise an operator that is one binding."""
    variable, call = body.bindings[index]
    shape = static_shape(variable)
    if shape is None or dtype_of(variable) != "float32":
        return None
    alone = frozenset([index])
    if norm_of(call) and _is_over_features(body, call):
        gain = cost.norm_gain(product(shape), machine)
        return PanelOp("norm", alone, index, (call.args[0],), gain)
    if call_of(call, "reshape") and _keeps_features(variable, call):
        return PanelOp("view", alone, index, (call.args[0],), 0.0)
    first = first_of_slice(variable, call)
    if first is not None:
        return PanelOp("slice", alone, index, (call.args[0],), 0.0, first)
    if call_of(call, "concat") and int(call.attrs.axis or 0) % len(shape) == len(shape) - 1:
        return PanelOp("concat", alone, index, tuple(call.args[0].fields), 0.0)
    return None


@dataclass(frozen=True)
class Norm:
    """A normalisation: whether the mean is subtracted, and which weights it has."""

    centred: bool
    gamma: bool
    beta: bool


def norm_of(call: Any) -> Norm | None:
    """Recognise a normalisation."""
    if call_of(call, "nn.layer_norm"):
        return Norm(True, bool(call.attrs.scale), bool(call.attrs.center))
    return Norm(False, True, False) if call_of(call, "nn.rms_norm") else None


def _is_over_features(body: Body, call: Any) -> bool:
    """Whether a normalisation runs over the last axis, with weights that are known."""
    shape = static_shape(call.args[0])
    if shape is None:
        return False
    if [int(axis) % len(shape) for axis in call.attrs.axes] != [len(shape) - 1]:
        return False
    weights = [body.model.params.get(getattr(arg, "name", "")) for arg in call.args[1:3]]
    return all(w is not None and w.dtype == np.float32 and w.shape == shape[-1:] for w in weights)


def _keeps_features(variable: Any, call: Any) -> bool:
    before, after = static_shape(call.args[0]), static_shape(variable)
    return before is not None and after is not None and before[-1:] == after[-1:]


class _Graph:
    """Vertices and directed capacities, in nanoseconds; 0 is the side of panels, 1 that of rows."""

    def __init__(self) -> None:
        self.count = 2
        self.edges: dict[tuple[int, int], int] = {}

    def vertex(self) -> int:
        """Add a vertex."""
        self.count += 1
        return self.count - 1

    def connect(self, start: int, end: int, microseconds: float) -> None:
        """Make it cost something to have `start` in panels and `end` in rows."""
        capacity = min(round(microseconds * 1e3), 2**30)
        if capacity > 0:
            self.edges[start, end] = self.edges.get((start, end), 0) + capacity

    def panels_side(self) -> set[int]:
        """Cut, and return the vertices in panels."""
        starts, ends = zip(*self.edges, strict=True)
        shape = (self.count, self.count)
        capacity = csr_matrix((list(self.edges.values()), (starts, ends)), shape, np.int32)
        residual = capacity - maximum_flow(capacity, 0, 1).flow
        residual.data = np.maximum(residual.data, 0)
        residual.eliminate_zeros()
        return set(breadth_first_order(residual, 0, return_predecessors=False).tolist())


def _cheapest(body: Body, ops: Sequence[PanelOp], machine: X86Machine) -> list[PanelOp]:
    """Cut the graph of operators where it costs least."""
    if not any(op.gain_us > 0 for op in ops):
        return []
    graph = _Graph()
    vertices = {op.result: graph.vertex() for op in ops}
    for op in ops:
        if op.gain_us > 0:
            graph.connect(0, vertices[op.result], op.gain_us)
        else:
            graph.connect(vertices[op.result], 1, -op.gain_us)
    for name, readers in _values(body, ops).items():
        producer = vertices.get(body.position.get(name, -1), 1)
        users = [vertices[index] for index in readers.in_panels]
        # Constants are packed when the model is compiled.
        is_constant = name in body.model.params
        price = 0.0 if is_constant else cost.conversion_us(readers.elements, machine)
        # Packed once where a reader takes panels that come in rows, unpacked once the other way.
        packed, unpacked = graph.vertex(), graph.vertex()
        graph.connect(packed, producer, price)
        for user in users:
            graph.connect(user, packed, 1e6)
        graph.connect(producer, unpacked, price)
        for user in [*users, *([1] if readers.in_rows else [])]:
            graph.connect(unpacked, user, 1e6)
    side = graph.panels_side()
    return [op for op in ops if vertices[op.result] in side]


@dataclass
class _Readers:
    elements: int
    in_panels: list[int] = field(default_factory=list)
    in_rows: bool = False


def _values(body: Body, ops: Sequence[PanelOp]) -> dict[str, _Readers]:
    """List the values that operators exchange, and who reads each."""
    values: dict[str, _Readers] = {}

    def readers(variable: Any) -> _Readers:
        elements = product(static_shape(variable) or (1,))
        return values.setdefault(variable.name, _Readers(elements))

    inside: dict[int, PanelOp] = {index: op for op in ops for index in op.members}
    for op in ops:
        readers(body.bindings[op.result][0])
        for variable in {variable.name: variable for variable in op.inputs}.values():
            readers(variable).in_panels.append(op.result)
    for name, entry in values.items():
        for user in body.users.get(name, []):
            reader = inside.get(user)
            if reader is None or name not in {variable.name for variable in reader.inputs}:
                entry.in_rows = True
    return values


def _groups(body: Body, chosen: Sequence[PanelOp]) -> list[tuple[int, ...]]:
    """Find weights side by side: what one attention reads of the same activations."""
    by_result = {op.result: op for op in chosen}
    groups = []
    for op in chosen:
        if op.kind != "attention":
            continue
        results = [body.position.get(variable.name, -1) for variable in op.inputs]
        sources = [by_result.get(index) for index in results]
        if len(set(results)) != 3 or any(s is None or s.kind != "weight" for s in sources):
            continue
        weights = [source for source in sources if source is not None]
        same = {source.inputs[0].name for source in weights if len(source.inputs) == 1}
        users = [set(body.users[variable.name]) for variable in op.inputs]
        if (
            len(same) == 1
            and all(len(s.inputs) == 1 for s in weights)
            and all(read <= op.members for read in users)
        ):
            groups.append(tuple(results))
    return groups
