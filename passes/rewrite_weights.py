"""Replace each planned operator, with what is fused behind it, by one call of its kernel.

Activations lie in rows or in panels, as `choose_layout` has it. Conversions are emitted where they
are needed first, and once. Operators on panels wait until somebody needs rows: then all of them run
for the first part of a batch, then for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..model import Model
from ..ops.base import product
from ..panels import Panels, Source
from ..schedules.x86.panels_attention import MaskKind, attention_panels
from ..schedules.x86.panels_concat import concat_panels
from ..schedules.x86.panels_convert import pack_panels, unpack_panels
from ..schedules.x86.panels_elementwise import elementwise_panels
from ..schedules.x86.panels_norm import layer_norm_panels
from ..schedules.x86.panels_rotary import rotary_panels
from ..targets import Machine
from ..workload import Epilogue
from .choose_layout import Layout, PanelOp, norm_of
from .collect_weights import FusedSite
from .fuse_epilogue import FusedEpilogue
from .match_attention import Angles, Attention
from .rewrite_main import constant_of, dtype_of, operands_of, static_shape


@dataclass(frozen=True)
class KernelCall:
    """A built kernel and the arrays that stand for its weight.

    Attributes
    ----------
    symbol : str
        Names the function in the module; calls with the same symbol share one function.
    function : PrimFunc
    arrays : sequence of numpy.ndarray
        The packed weight.
    channels : sequence of numpy.ndarray
        The epilogue's vectors.
    panels : Panels or None
        How activations are cut when the kernel takes panels.
    features, first : int
        Features of the kernel's result, and the first one of this layer's: several layers may be
        one call.
    group : tuple of str
        The bindings of all layers of the call.
    on_tensor_cores : bool
        As the kernel's template says.
    """

    symbol: str
    function: Any
    arrays: Sequence[np.ndarray]
    channels: Sequence[np.ndarray] = ()
    panels: Panels | None = None
    features: int = 0
    first: int = 0
    group: tuple[str, ...] = ()
    on_tensor_cores: bool = False


def rewrite_weights(
    model: Model,
    sites: Sequence[FusedSite],
    calls: Mapping[str, KernelCall],
    layout: Layout,
    machine: Machine,
) -> tvm.IRModule:
    """Emit `main` anew with kernels in the place of operators.

    Parameters
    ----------
    model : Model
        In canonical form: one dataflow block.
    sites : sequence of FusedSite
        What `collect_weights` found.
    calls : mapping of str to KernelCall
        By the name of the site's binding. Sites without an entry stay as they are.
    layout : Layout
        The operators that work on panels.
    machine : Machine
        What kernels are built for.

    Returns
    -------
    tvm.IRModule
        Weights that no kernel packed are still parameters of `main`.
    """
    return _Emitter(model, sites, calls, layout, machine).module()


@dataclass(frozen=True)
class _InPanels:
    """A value in panels: so many features of a tensor that may hold more.

    Attributes
    ----------
    tensor : relax.Expr
    panels : Panels
    features : int
        Of the value.
    held : int
        Of the tensor.
    first : int
        The value's first one there.
    """

    tensor: Any
    panels: Panels
    features: int
    held: int
    first: int = 0

    def part(self, first: int, features: int) -> _InPanels:
        """Take some of the value's features."""
        return replace(self, first=self.first + first, features=features)


class _Emitter:
    def __init__(
        self,
        model: Model,
        sites: Sequence[FusedSite],
        calls: Mapping[str, KernelCall],
        layout: Layout,
        machine: Machine,
    ) -> None:
        self.model, self.calls, self.layout, self.machine = model, calls, layout, machine
        self.function = model.mod["main"]
        self.flat = [b for block in self.function.body.blocks for b in block.bindings]
        self.starts = {f.fused.result: f for f in sites if f.site.binding in calls}
        self.dropped = {index for f in self.starts.values() for index in f.fused.members}
        self.dropped |= {index for op in layout.ops.values() for index in op.members}
        self.results = {f.site.binding: self.flat[p].var for p, f in self.starts.items()}
        # Made once, however many parts and attentions use them.
        self.constants: dict[tuple[str, ...], list[Any]] = {}
        self.masks: dict[tuple[str, int], tuple[MaskKind, Any]] = {}
        self.builder = relax.BlockBuilder(model.mod)
        self.functions: dict[Any, Any] = {}
        # Operators on panels that wait, and the names of their results.
        self.waiting: list[tuple[PanelOp, Any]] = []
        self.awaited: set[str] = set()
        # What has been emitted so far: values in panels by name and part, and the rows that exist
        # of them.
        self.panels: dict[str, dict[int, _InPanels]] = {}
        self.in_rows: set[str] = set()
        self.copies: dict[Any, _InPanels] = {}
        self.part = 0
        self.bindings: list[Any] = []

    def module(self) -> tvm.IRModule:
        """Emit everything."""
        blocks, position = [], 0
        for block in self.function.body.blocks:
            self.bindings = []
            for binding in block.bindings:
                self._binding(position, binding)
                position += 1
            if block.same_as(self.function.body.blocks[-1]):
                self._need_rows(operands_of(self.function.body.body))
            self._run_waiting()
            blocks.append(type(block)(self.bindings))
        old = self.function
        body = relax.SeqExpr(blocks, old.body.body)
        rewritten = relax.Function(old.params, body, old.ret_ty, old.is_pure, old.attrs)
        module = self.builder.get()
        module.update_func(module.get_global_var("main"), rewritten)
        return relax.transform.Normalize()(module)

    def _binding(self, position: int, binding: Any) -> None:
        op = self.layout.ops.get(position)
        if op is not None:
            self.waiting.append((op, binding.var))
            self.awaited.add(binding.var.name)
        elif position in self.starts:
            self._site_in_rows(self.starts[position], binding.var)
        elif position not in self.dropped:
            self._need_rows(operands_of(binding.value))
            self.bindings.append(binding)

    # Values, in either layout.

    def _need_rows(self, operands: Iterable[Any]) -> None:
        """Unpack the operands that exist in panels only."""
        variables = [operand for operand in operands if isinstance(operand, relax.Var)]
        if any(variable.name in self.awaited for variable in variables):
            self._run_waiting()
        for variable in variables:
            if variable.name in self.panels:
                self._rows(variable)

    def _run_waiting(self) -> None:
        """Emit the operators that wait, part by part."""
        waiting, self.waiting, self.awaited = self.waiting, [], set()
        for part in range(self.layout.parts):
            self.part = part
            for op, result in waiting:
                self._panel_op(op, result)

    def _rows(self, variable: Any) -> None:
        if variable.name in self.in_rows:
            return
        self.in_rows.add(variable.name)
        values = [self._alone(value) for value in self.panels[variable.name].values()]
        panels, features = values[0].panels, values[0].features
        assert len(values) == self.layout.parts
        symbol = self._shared(unpack_panels, panels, features, self.machine, len(values))
        shape = [len(values) * panels.tokens, features]
        tensors = [value.tensor for value in values]
        self._reshape_to(variable, self._call(symbol, tensors, shape, f"{variable.name}_rows"))

    def _in_panels(self, variable: Any, panels: Panels) -> _InPanels:
        """Return the part of a value that is in work."""
        known = self.panels.setdefault(variable.name, {})
        if self.part not in known:
            shape = static_shape(variable)
            assert shape is not None
            # Nothing gave it in panels, so it came in rows.
            self.in_rows.add(variable.name)
            tensor = self._packed(variable, panels, shape[-1])
            known[self.part] = _InPanels(tensor, panels, shape[-1], shape[-1])
        return known[self.part]

    def _packed(self, variable: Any, panels: Panels, features: int) -> Any:
        """Bring rows into panels; constants when the model is compiled."""
        constant = self.model.params.get(variable.name)
        if constant is not None:
            rows = constant.reshape(self.layout.parts, panels.tokens, features)
            return relax.const(panels.pack(rows[self.part]))
        matrix = self._as_matrix(variable)
        symbol = self._shared(
            pack_panels, panels, features, self.machine, self.part, self.layout.parts
        )
        return self._call(symbol, [matrix], [panels.size(features)], f"{variable.name}_panels")

    def _alone(self, value: _InPanels) -> _InPanels:
        """Give a tensor to a value that shares one."""
        if value.features == value.held:
            return value
        key = (value.tensor, value.first, value.features)
        if key not in self.copies:
            self.copies[key] = self._elementwise_call(Epilogue(), [value], [], "copy_panels")
        return self.copies[key]

    # Emission.

    def _shared(self, build: Callable[..., Any], *arguments: Any) -> Any:
        """Build a kernel without a weight once for all that need the same."""
        key = (build.__name__, *arguments)
        if key not in self.functions:
            function = build(*arguments)
            self.functions[key] = self.builder.add_func(function, build.__name__)
        return self.functions[key]

    def _symbol(self, call: KernelCall) -> Any:
        if call.symbol not in self.functions:
            function = call.function.with_attr("global_symbol", call.symbol)
            self.functions[call.symbol] = self.builder.add_func(function, call.symbol)
        return self.functions[call.symbol]

    def _constants(self, call: KernelCall) -> list[Any]:
        if call.group not in self.constants:
            arrays = (*call.arrays, *call.channels)
            self.constants[call.group] = [relax.const(array) for array in arrays]
        return self.constants[call.group]

    def _bind(self, expression: Any, name: str) -> Any:
        variable = relax.DataflowVar(name, expression.ty)
        self.bindings.append(relax.VarBinding(variable, expression))
        return variable

    def _call(
        self,
        symbol: Any,
        arguments: Sequence[Any],
        shape: Sequence[Any],
        name: str,
        dtype: str = "float32",
    ) -> Any:
        return self._bind(_typed_call(symbol, arguments, shape, dtype), name)

    def _as_matrix(self, value: Any) -> Any:
        """See activations as [tokens, features]."""
        self._need_rows([value])
        shape = list(value.ty.shape)
        if len(shape) == 2:
            return value
        name = getattr(value, "name", "constant")
        matrix = _typed_reshape(value, [product(shape[:-1]), shape[-1]])
        return self._bind(matrix, f"{name}_matrix")

    def _reshape_to(self, variable: Any, matrix: Any) -> None:
        """Bind a variable to the matrix that holds its value."""
        shape = list(variable.ty.shape)
        expression = matrix if len(shape) == 2 else relax.op.reshape(matrix, shape)
        self.bindings.append(relax.VarBinding(variable, expression))

    # Operators in rows.

    def _site_in_rows(self, fused_site: FusedSite, result: Any) -> None:
        """Bind the kernel's call to `result`; matmuls see their activations as matrices."""
        call, fused = self.calls[fused_site.site.binding], fused_site.fused
        is_matmul = fused_site.site.workload.op == "matmul"
        self._need_rows([fused_site.data, *fused.tensors])

        def seen(value: Any) -> Any:
            return self._as_matrix(value) if is_matmul else value

        arguments = [seen(fused_site.data), *self._constants(call)]
        arguments += [seen(tensor) for tensor in fused.tensors]
        shape, dtype = list(result.ty.shape), dtype_of(result)
        if is_matmul and len(shape) != 2:
            matrix = [product(shape[:-1]), shape[-1]]
            y = self._call(self._symbol(call), arguments, matrix, f"{result.name}_y", dtype)
            self._reshape_to(result, y)
        else:
            expression = _typed_call(self._symbol(call), arguments, shape, dtype)
            self.bindings.append(relax.VarBinding(result, expression))

    # Operators in panels.

    def _panel_op(self, op: PanelOp, result: Any) -> None:
        emit = {
            "weight": self._site_in_panels,
            "attention": self._attention,
            "norm": self._norm,
            "elementwise": self._elementwise,
            "concat": self._concat,
            "slice": self._part_of_features,
            "view": self._view,
        }
        emit[op.kind](op, result)

    def _view(self, op: PanelOp, result: Any) -> None:
        self._gives(result.name, self._in_panels(op.inputs[0], self.layout.panels[op.result]))

    def _part_of_features(self, op: PanelOp, result: Any) -> None:
        value = self._in_panels(op.inputs[0], self.layout.panels[op.result])
        self._gives(result.name, value.part(op.what, _features(result)))

    def _gives(self, name: str, value: _InPanels) -> None:
        self.panels.setdefault(name, {})[self.part] = value

    def _site_in_panels(self, op: PanelOp, result: Any) -> None:
        call, panels = self.calls[op.what.site.binding], self.layout.panels[op.result]
        if self.part in self.panels.get(result.name, {}):
            # Another layer of its group was first.
            return
        inputs = [self._alone(self._in_panels(v, panels)).tensor for v in op.inputs]
        arguments = [inputs[0], *self._constants(call), *inputs[1:]]
        shape = [panels.size(call.features)]
        tensor = self._call(self._symbol(call), arguments, shape, f"{result.name}_panels")
        for binding in call.group:
            layer = self.results[binding]
            first, features = self.calls[binding].first, _features(layer)
            self._gives(layer.name, _InPanels(tensor, panels, features, call.features, first))

    def _elementwise(self, op: PanelOp, result: Any) -> None:
        chain: FusedEpilogue = op.what
        panels = self.layout.panels[op.result]
        values = [self._in_panels(variable, panels) for variable in op.inputs]
        vectors = [self._vector(name) for name in chain.channels]
        name = f"{result.name}_panels"
        self._gives(result.name, self._elementwise_call(chain.epilogue, values, vectors, name))

    def _elementwise_call(
        self, chain: Epilogue, values: Sequence[_InPanels], vectors: Sequence[Any], name: str
    ) -> _InPanels:
        panels, features = values[0].panels, values[0].features
        tensors, sources = _sources(values)
        symbol = self._shared(elementwise_panels, panels, features, chain, sources, self.machine)
        tensor = self._call(symbol, [*tensors, *vectors], [panels.size(features)], name)
        return _InPanels(tensor, panels, features, features)

    def _vector(self, name: str) -> Any:
        """Make a constant of a weight with one number a feature."""
        if (name,) not in self.constants:
            self.constants[name,] = [relax.const(self.model.params[name].reshape(-1))]
        return self.constants[name,][0]

    def _concat(self, op: PanelOp, result: Any) -> None:
        panels, features = self.layout.panels[op.result], _features(result)
        values = [self._in_panels(variable, panels) for variable in op.inputs]
        tensors, sources = _sources(values)
        widths = tuple(value.features for value in values)
        symbol = self._shared(concat_panels, panels, widths, sources, self.machine)
        tensor = self._call(symbol, tensors, [panels.size(features)], f"{result.name}_panels")
        self._gives(result.name, _InPanels(tensor, panels, features, features))

    def _norm(self, op: PanelOp, result: Any) -> None:
        panels = self.layout.panels[op.result]
        value = self._alone(self._in_panels(op.inputs[0], panels))
        call = self.flat[op.result].value
        norm = norm_of(call)
        assert norm is not None
        weights = zip(call.args[1:], (norm.gamma, norm.beta), strict=False)
        used = [weight for weight, is_used in weights if is_used]
        symbol = self._shared(
            layer_norm_panels,
            panels,
            value.features,
            self.machine,
            float(call.attrs.epsilon),
            norm.gamma,
            norm.beta,
            norm.centred,
        )
        shape = [panels.size(value.features)]
        tensor = self._call(symbol, [value.tensor, *used], shape, f"{result.name}_panels")
        self._gives(result.name, _InPanels(tensor, panels, value.features, value.features))

    def _attention(self, op: PanelOp, result: Any) -> None:
        a: Attention = op.what
        panels = self.layout.panels[op.result]
        query, key, value = (self._in_panels(variable, panels) for variable in op.inputs)
        query = self._rotated(query, a.query_angles, a.geometry.heads)
        key = self._rotated(key, a.key_angles, a.geometry.kv_heads)
        tensors, sources = _sources([query, key, value])
        kind, mask = self._mask(a)
        lead = (static_shape(mask) if mask is not None else None) or (1, 1)
        batch = a.geometry.batch // self.layout.parts
        geometry = replace(
            a.geometry, batch=batch, mask=kind, mask_batch=lead[0], mask_heads=lead[1]
        )
        symbol = self._shared(attention_panels, geometry, panels, sources, self.machine)
        features = geometry.heads * geometry.depth
        arguments = [*tensors, *([] if mask is None else [mask])]
        tensor = self._call(symbol, arguments, [panels.size(features)], f"{result.name}_panels")
        self._gives(result.name, _InPanels(tensor, panels, features, features))

    def _rotated(self, value: _InPanels, angles: Angles | None, heads: int) -> _InPanels:
        """Turn the features of each head by the angles of the tokens, if there are any."""
        if angles is None:
            return value
        panels, features = value.panels, value.features
        tables = [
            self._angles(name, panels, features // heads) for name in (angles.cos, angles.sin)
        ]
        [tensor], [source] = _sources([value])
        symbol = self._shared(rotary_panels, panels, heads, features // heads, source, self.machine)
        size = [panels.size(features)]
        turned = self._call(symbol, [tensor, *tables], size, "rotary_panels")
        return _InPanels(turned, panels, features, features)

    def _angles(self, name: str, panels: Panels, depth: int) -> Any:
        """Repeat a table of angles for every sequence, in panels."""
        key = (name, "angles", str(panels))
        if key not in self.constants:
            table = self.model.params[name].reshape(-1, depth)
            rows = np.tile(table, (panels.tokens // len(table), 1))
            self.constants[key] = [relax.const(panels.pack(rows))]
        return self.constants[key][0]

    def _mask(self, attention: Attention) -> tuple[MaskKind, Any]:
        """Tell what kind of mask there is, and bring it to [batch, heads, keys, queries]."""
        mask = attention.mask
        if mask is None:
            return "none", None
        # The layers of a network share a mask.
        key = (getattr(mask, "name", str(id(mask))), self.part)
        if key not in self.masks:
            causal = _is_causal(constant_of(mask, self.model.params), attention.geometry.tokens)
            self.masks[key] = ("causal", None) if causal else self._turned_mask(mask)
        return self.masks[key]

    def _turned_mask(self, mask: Any) -> tuple[MaskKind, Any]:
        self._need_rows([mask])
        shape, name = static_shape(mask), getattr(mask, "name", "mask")
        assert shape is not None
        full = (*([1] * (4 - len(shape))), *shape)
        if len(shape) != 4:
            mask = self._bind(_typed_reshape(mask, full), f"{name}_mask")
        if full[0] > 1 and self.layout.parts > 1:
            items = full[0] // self.layout.parts
            full = (items, *full[1:])
            begin = self.part * items
            piece = relax.op.strided_slice(mask, [0], [begin], [begin + items])
            relax.expr._update_type(piece, relax.TensorType(full, dtype_of(mask)))
            mask = self._bind(piece, f"{name}_mask_part")
        order = [full[0], full[1], full[3], full[2]]
        if full[2] == 1:
            return "keys", self._bind(_typed_reshape(mask, order), f"{name}_keys")
        turned = relax.op.permute_dims(mask, [0, 1, 3, 2])
        relax.expr._update_type(turned, relax.TensorType(order, dtype_of(mask)))
        return "pairs", self._bind(turned, f"{name}_pairs")


# Added to a score, this leaves nothing of its share beside one that nothing was added to.
_NOTHING = -1e9


def _is_causal(mask: np.ndarray | None, tokens: int) -> bool:
    """Whether a mask is 0 up to the query, and hides all keys behind it."""
    if mask is None or mask.shape[-2:] != (tokens, tokens):
        return False
    seen = np.tri(tokens, dtype=bool)
    return bool(np.all(mask[..., seen] == 0) and np.all(mask[..., ~seen] <= _NOTHING))


def _sources(values: Sequence[_InPanels]) -> tuple[list[Any], tuple[Source, ...]]:
    """Return the tensors that hold some values, each once, and where the values lie in them."""
    tensors: list[Any] = []
    sources = []
    for value in values:
        if not any(value.tensor.same_as(known) for known in tensors):
            tensors.append(value.tensor)
        number = next(i for i, known in enumerate(tensors) if known.same_as(value.tensor))
        sources.append(Source(number, value.held, value.first))
    return tensors, tuple(sources)


def _features(variable: Any) -> int:
    shape = static_shape(variable)
    assert shape is not None
    return shape[-1]


def _typed_call(symbol: Any, arguments: Sequence[Any], shape: Sequence[Any], dtype: str) -> Any:
    out_ty = relax.TensorType(list(shape), dtype)
    call = relax.call_tir(symbol, relax.Tuple(list(arguments)), out_ty=out_ty)
    relax.expr._update_type(call, out_ty)
    return call


def _typed_reshape(value: Any, shape: Sequence[Any]) -> Any:
    call = relax.op.reshape(value, list(shape))
    relax.expr._update_type(call, relax.TensorType(list(shape), dtype_of(value)))
    return call
