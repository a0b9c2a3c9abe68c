"""Elementwise chains, slices and concatenation on panels: kernels, and whole networks of them."""

import numpy as np
import pytest
from attention_models import Layer
from dense_support import EPS, machine, run
from gated_models import GatedLayer, gated_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_support import agrees, kernels_of
from onnx import helper
from tvm import relax
from tvm_sparse.passes import choose_layout as choose_layout_module
from tvm_sparse.schedules.epilogue import EMITTERS
from tvm_sparse.schedules.x86.panels_concat import concat_panels
from tvm_sparse.schedules.x86.panels_elementwise import elementwise_panels
from tvm_sparse.schedules.x86.panels_rotary import rotary_panels

import tvm_sparse as ts
from tvm_sparse.epilogue_reference import evaluate64
from tvm_sparse.panels import Panels, Source
from tvm_sparse.workload import Epilogue, EpilogueOp, EpilogueRef

LANES = [16, 8, 4]
UNARY = ["negative", "abs", "exp", "erf", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh"]
BINARY = ["add", "subtract", "multiply", "maximum", "minimum"]


def draw_rows(shape, seed=0):
    return np.random.default_rng(seed).uniform(-2, 2, shape).astype("float32")


@st.composite
def chains(draw):
    """Draw a graph whose last operation reads all of those that nothing else reads."""
    tensors, channels = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    leaves = [EpilogueRef("tensor", i) for i in range(tensors)]
    leaves += [EpilogueRef("channel", i) for i in range(channels)]
    leaves += [EpilogueRef("scalar", value=0.75)]
    ops = []
    for count in range(draw(st.integers(1, 6))):
        refs = [*leaves, *(EpilogueRef("node", i) for i in range(count))]
        name = draw(st.sampled_from([*UNARY, *BINARY, "sqrt", "divide"]))
        inputs = [
            draw(st.sampled_from(refs)) for _ in range(2 if name in [*BINARY, "divide"] else 1)
        ]
        if name == "sqrt":
            ops.append(EpilogueOp("abs", tuple(inputs)))
            inputs = [EpilogueRef("node", len(ops) - 1)]
        if name == "divide":
            inputs[1] = EpilogueRef("scalar", value=-1.5)
        ops.append(EpilogueOp(name, tuple(inputs)))
    return Epilogue(tuple(ops), channels, tensors)


@pytest.mark.parametrize("lanes", LANES)
@settings(max_examples=15)
@given(
    chain=chains(),
    tokens=st.integers(1, 100),
    features=st.integers(1, 20),
    nt=st.integers(1, 4),
    together=st.booleans(),
)
def test_chains_agree_with_float64(lanes, chain, tokens, features, nt, together):
    panels = Panels(tokens, nt, lanes)
    tensors = [draw_rows((tokens, features), seed) for seed in range(chain.tensors)]
    channels = [draw_rows(features, 10 + seed) for seed in range(chain.channels)]
    if together:
        held = chain.tensors * features
        sources = tuple(Source(0, held, i * features) for i in range(chain.tensors))
        inputs = [panels.pack(np.concatenate(tensors, 1))]
    else:
        sources = tuple(Source(i, features) for i in range(chain.tensors))
        inputs = [panels.pack(tensor) for tensor in tensors]
    func = elementwise_panels(panels, features, chain, sources, machine(lanes))
    flat = run(func, lanes, [*inputs, *channels], (panels.size(features),))
    want, bound = evaluate64(chain, None, None, channels, tensors)
    with np.errstate(invalid="ignore", over="ignore"):
        limit = np.finfo("float32").max / 4
        sane = np.broadcast_to(np.isfinite(want) & (np.abs(want) < limit), (tokens, features))
        close = np.abs(panels.unpack(flat, features) - want) <= bound + 1e-37
    assert np.all(close[sane & np.isfinite(bound)])
    assert_zeros_behind(panels, flat, features)


def assert_zeros_behind(panels, flat, features):
    for first, width in panels.bounds():
        assert not flat[first * (features + 1) + features * width :][:width].any()


@pytest.mark.parametrize("lanes", LANES)
def test_a_chain_of_nothing_copies(lanes):
    panels, rows = Panels(37, 2, lanes), draw_rows((37, 12))
    func = elementwise_panels(panels, 5, Epilogue(), (Source(0, 12, 4),), machine(lanes))
    flat = run(func, lanes, [panels.pack(rows)], (panels.size(5),))
    assert np.array_equal(panels.unpack(flat, 5), rows[:, 4:9])
    assert_zeros_behind(panels, flat, 5)


@pytest.mark.parametrize("lanes", LANES)
@settings(max_examples=8)
@given(
    tokens=st.integers(1, 100),
    widths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    nt=st.integers(1, 4),
)
def test_concatenation_keeps_every_number(lanes, tokens, widths, nt):
    panels = Panels(tokens, nt, lanes)
    parts = [draw_rows((tokens, width), seed) for seed, width in enumerate(widths)]
    # The last is a slice of a wider tensor.
    wider = np.concatenate([draw_rows((tokens, 3), 9), parts[-1]], 1)
    sources = [Source(i, width) for i, width in enumerate(widths)]
    sources[-1] = Source(len(widths) - 1, widths[-1] + 3, 3)
    func = concat_panels(panels, tuple(widths), tuple(sources), machine(lanes))
    inputs = [panels.pack(rows) for rows in [*parts[:-1], wider]]
    flat = run(func, lanes, inputs, (panels.size(sum(widths)),))
    assert np.array_equal(panels.unpack(flat, sum(widths)), np.concatenate(parts, 1))
    assert_zeros_behind(panels, flat, sum(widths))


SIZES = {"heads": 4, "depth": 16, "kv_heads": 2}


@pytest.mark.parametrize("gate", ["silu", "gelu"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_gated_encoder_packs_once_and_unpacks_once(gate, fused):
    kernels = kernels_of(gated_encoder(tokens=40, gate=gate, fused=fused, **SIZES))
    assert kernels[0] == "pack_panels"
    assert kernels[-1] == "unpack_panels"
    products = [name for name in kernels if "matmul" in name]
    assert kernels.count("pack_panels") == kernels.count("unpack_panels") == 1
    assert kernels.count("attention_panels") == 2
    assert kernels.count("layer_norm_panels") == 5
    # A product takes in the gate, but not where what it opens is of the same product.
    assert kernels.count("elementwise_panels") == (2 if fused else 0)
    assert len(products) == 2 * (4 if fused else 5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 17), (1, 50), (3, 32), (2, 128)])
def test_a_gated_encoder_agrees(fused, batch, tokens):
    symbols = agrees(gated_encoder(batch=batch, tokens=tokens, fused=fused, **SIZES))
    assert "attention_panels" in symbols


def test_a_gated_encoder_in_parts_agrees(monkeypatch):
    monkeypatch.setattr(choose_layout_module, "_parts", lambda *_: 2)
    symbols = agrees(gated_encoder(batch=4, tokens=16, fused=True, **SIZES))
    assert "elementwise_panels" in symbols


ROTARY = ["before turning", "behind turning"]


@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 50), (3, 32)])
def test_rotary_embeddings_stay_in_panels(rotary, fused, batch, tokens):
    proto = gated_encoder(batch=batch, tokens=tokens, fused=fused, rotary=rotary, **SIZES)
    kernels = kernels_of(proto)
    assert kernels.count("pack_panels") == kernels.count("unpack_panels") == 1
    assert kernels.count("rotary_panels") == 2 * kernels.count("attention_panels") == 4
    assert set(agrees(proto)) >= {"rotary_panels", "attention_panels"}


@pytest.mark.parametrize("parts", [2, 4])
def test_rotary_embeddings_of_a_batch_in_parts_agree(monkeypatch, parts):
    monkeypatch.setattr(choose_layout_module, "_parts", lambda *_: parts)
    proto = gated_encoder(batch=4, tokens=16, rotary="behind turning", **SIZES)
    assert "rotary_panels" in agrees(proto)


@pytest.mark.parametrize("lanes", LANES)
@settings(max_examples=8)
@given(
    tokens=st.integers(1, 100),
    heads=st.integers(1, 3),
    half=st.integers(1, 6),
    nt=st.integers(1, 4),
    before=st.integers(0, 3),
)
def test_rotary_embeddings_agree_with_float64(lanes, tokens, heads, half, nt, before):
    panels, depth = Panels(tokens, nt, lanes), 2 * half
    x = draw_rows((tokens, before + heads * depth))
    cos, sin = draw_rows((tokens, depth), 1), draw_rows((tokens, depth), 2)
    source = Source(0, x.shape[1], before)
    func = rotary_panels(panels, heads, depth, source, machine(lanes))
    inputs = [panels.pack(rows) for rows in (x, cos, sin)]
    flat = run(func, lanes, inputs, (panels.size(heads * depth),))
    wide = x[:, before:].astype("float64").reshape(tokens, heads, 2, half)
    turned = np.stack([-wide[:, :, 1], wide[:, :, 0]], 2)
    tables = [t.astype("float64").reshape(tokens, 1, 2, half) for t in (cos, sin)]
    want = (wide * tables[0] + turned * tables[1]).reshape(tokens, -1)
    assert np.abs(panels.unpack(flat, heads * depth) - want).max() <= 4 * 8 * EPS
    assert_zeros_behind(panels, flat, heads * depth)


def finished(g, value):
    g.nodes.append(helper.make_node("Identity", [value], ["y"]))
    return g.proto()


@pytest.mark.parametrize(("batch", "parts"), [(1, 1), (4, 1), (4, 2)])
def test_a_table_of_the_same_shape_is_packed_when_compiled(monkeypatch, batch, parts):
    monkeypatch.setattr(choose_layout_module, "_parts", lambda *_: parts)
    g = GatedLayer(batch=batch, tokens=32, heads=1, depth=24)
    table = g.constant(g.rng.standard_normal((batch, 32, 24)))
    placed = g.op("Mul", g.rms_norm(g.linear("x", 24, 24), 24), table)
    proto = finished(g, g.linear(placed, 24, 24))
    kernels = kernels_of(proto)
    assert kernels.count("pack_panels") == kernels.count("elementwise_panels") == parts
    agrees(proto)


OPERATIONS = {
    "rsqrt": (relax.op.rsqrt, lambda x: x**-0.5),
    "square": (relax.op.square, np.square),
    "power": (lambda x: relax.op.power(x, relax.const(0.5, "float32")), np.sqrt),
    "clip": (lambda x: relax.op.clip(x, 0.25, 2), lambda x: np.clip(x, 0.25, 2)),
    "leaky": (lambda x: relax.op.nn.leakyrelu(x, 0.5), lambda x: np.maximum(x, 0.5 * x)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operators_without_an_onnx_name_are_chains(name):
    apply, reference = OPERATIONS[name]
    eye = relax.const(np.eye(32, dtype="float32"))
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((40, 32), "float32"))
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            first = builder.emit(relax.op.matmul(x, eye))
            norm = builder.emit(relax.op.nn.rms_norm(first, relax.const(np.ones(32, "f4")), [-1]))
            # Roots of negative numbers would be NaN, which a sparse product need not spread.
            changed = builder.emit(apply(builder.emit(relax.op.abs(norm))))
            y = builder.emit_output(relax.op.matmul(changed, eye))
        builder.emit_func_output(y)
    module = ts.compile(builder.get(), "native", threads=1)
    rows = draw_rows((40, 32))
    [got] = module.run({"x": rows}).values()
    want = reference(np.abs(rows) / np.sqrt(np.square(rows).mean(1, keepdims=True)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert "elementwise_panels" in [row.symbol for row in module.profile(rows).kernels]


def test_a_product_of_half_of_the_features_gets_a_tensor_of_its_own():
    g = GatedLayer(tokens=40, heads=1, depth=24)
    a, b = g.split(g.linear("x", 24, 48), [16, 32])
    proto = finished(g, g.op("Concat", g.linear(a, 16, 8), b, g.linear(b, 32, 8), axis=-1))
    symbols = agrees(proto)
    assert "elementwise_panels" in symbols and "concat_panels" in symbols


def test_values_that_many_read_leave_their_chain():
    g = Layer(tokens=40, heads=1, depth=24)
    a = g.linear("x", 24, 24)
    b = g.linear(a, 24, 24)
    both = g.op("Tanh", g.op("Sub", a, g.op("Sigmoid", b)))
    proto = finished(g, g.op("Add", g.linear(both, 24, 24), g.op("Mul", both, b)))
    agrees(proto)


STEPS = [
    "product",
    "norm",
    "Add",
    "Mul",
    "Sub",
    "Max",
    "Tanh",
    "Sigmoid",
    "Relu",
    "split",
    "concat",
]


@settings(max_examples=25)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9)),
        min_size=3,
        max_size=12,
    ),
    batch=st.sampled_from([1, 2]),
    tokens=st.sampled_from([16, 23, 40]),
)
def test_networks_of_any_operators_agree(steps, batch, tokens):
    g = GatedLayer(batch=batch, tokens=tokens, heads=1, depth=12)
    values = [g.linear("x", 12, 12)]
    for kind, left, right in steps:
        a, b = values[left % len(values)], values[right % len(values)]
        if kind == "product":
            values.append(g.linear(a, 12, 12))
        elif kind == "norm":
            values.append(g.rms_norm(a, 12))
        elif kind == "split":
            values.append(g.op("Concat", *reversed(g.split(a, [5, 7])), axis=-1))
        elif kind == "concat":
            values.append(g.linear(g.op("Concat", a, b, axis=-1), 24, 12))
        elif kind in ("Tanh", "Sigmoid", "Relu"):
            values.append(g.op(kind, a))
        else:
            values.append(g.op(kind, a, b))
    agrees(finished(g, g.op("Tanh", g.linear(g.rms_norm(values[-1], 12), 12, 12))))


def test_every_operation_of_an_epilogue_is_drawn():
    assert {*UNARY, *BINARY, "sqrt", "divide"} == set(EMITTERS)


def test_reports_name_no_kernel_of_a_chain_as_a_layer():
    module = ts.compile(gated_encoder(tokens=40, fused=True, **SIZES), "native", threads=1)
    assert len(module.report.layers) == 2 * 4
