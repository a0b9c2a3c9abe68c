"""The layout of activations: panels from the first layer to the last, converted where it pays."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
from attention_models import Layer, attention, stacked_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_support import MACHINE, TARGET, agrees, kernels_of
from onnx import helper
from tvm import relax
from tvm_sparse.passes import choose_layout as choose_layout_module
from tvm_sparse.passes.choose_layout import choose_layout
from tvm_sparse.passes.collect_weights import collect_weights
from tvm_sparse.passes.fuse_elementwise import elementwise_chains
from tvm_sparse.passes.fuse_epilogue import Body
from tvm_sparse.passes.match_attention import match_attention
from tvm_sparse.schedules.x86 import cost

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.pipeline import lower_model

ENCODER = {"layers": 2, "hidden": 64, "heads": 4, "ffn": 128}


def pruned(proto, sparsity=0.8):
    return ts.prune(proto, sparsity=sparsity, scope="layer")


def test_an_encoder_packs_at_its_entry_and_unpacks_at_its_exit():
    kernels = kernels_of(pruned(zoo.bert_encoder(**ENCODER, seq=32)))
    assert kernels[0] == "pack_panels"
    assert kernels[-1] == "unpack_panels"
    assert kernels.count("pack_panels") == kernels.count("unpack_panels") == 1
    assert kernels.count("attention_panels") == 2
    assert kernels.count("layer_norm_panels") == 4


def test_queries_keys_and_values_of_one_input_are_one_product():
    kernels = kernels_of(pruned(zoo.bert_encoder(**ENCODER, seq=32)))
    assert sum("matmul_of_3" in name for name in kernels) == 2
    # The others: behind attention, and two of the feed-forward net.
    assert sum("matmul" in name for name in kernels) == 2 * (1 + 3)


def test_layers_that_are_one_product_keep_their_names_errors_and_times():
    proto = pruned(zoo.bert_encoder(**ENCODER, seq=32))
    module = ts.compile(proto, "native", threads=1)
    rows = {row.name: row for row in module.report.layers}
    parts = [rows[f"encoder.layer.0.attention.{part}"] for part in ("query", "key", "value")]
    assert all(part.error_share is not None and part.error_share <= 1 for part in parts)
    assert all(part.config["layout"] == "panels" for part in parts)
    whole = sum(part.bytes_packed for part in parts)
    assert all(0.2 * whole < part.bytes_packed < 0.5 * whole for part in parts)
    x = np.zeros((1, 32, 64), "float32")
    times = module.profile(x).layers
    assert times[parts[0].name] == times[parts[1].name] > 0


def test_fewer_tokens_than_a_vector_stay_in_rows():
    kernels = kernels_of(pruned(zoo.bert_encoder(**ENCODER, seq=MACHINE.lanes - 1)))
    assert not any("panels" in name for name in kernels if "matmul" not in name)


def test_a_layer_that_stands_alone_takes_rows():
    assert not {"pack_panels", "unpack_panels"} & set(kernels_of(zoo.single_matmul(64, 64, 32)))


def test_root_mean_square_norms_stay_in_panels():
    rng = np.random.default_rng(0)

    def weight(*shape):
        return relax.const((rng.standard_normal(shape) * 0.1).astype("float32"))

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((48, 64), "float32"))
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            first = builder.emit(relax.op.matmul(x, weight(64, 64)))
            norm = builder.emit(relax.op.nn.rms_norm(first, weight(64), [-1], 1e-6))
            y = builder.emit_output(relax.op.matmul(norm, weight(64, 64)))
        builder.emit_func_output(y)
    # Dense, so small layers have their output channels side by side, and tokens in rows.
    plan = ts.plan(builder.get(), "native", threads=1, force={"*": "sliced_ell"})
    module = ts.compile(builder.get(), "native", plan=plan, threads=1)
    symbols = [row.symbol for row in module.profile(np.ones((48, 64), "float32")).kernels]
    assert "layer_norm_panels" in symbols


STYLES = ["divided", "multiplied", "both scaled", "turned twice"]


@pytest.mark.parametrize("style", STYLES)
def test_attention_is_found_however_it_is_written(style):
    assert "attention_panels" in agrees(attention(style, "keys"))


@pytest.mark.parametrize("batch", [1, 3])
def test_attention_is_found_as_pytorch_stacks_it(batch):
    kernels = agrees(stacked_attention(batch=batch, tokens=32))
    assert "attention_panels" in kernels
    assert not any("permute" in kernel for kernel in kernels)


@pytest.mark.parametrize(
    "mask", ["none", "causal", "causal of -inf", "keys", "pairs", "shared pairs"]
)
@pytest.mark.parametrize("tokens", [32, 50])
def test_attention_takes_masks(mask, tokens):
    assert "attention_panels" in agrees(attention(mask=mask, tokens=tokens))


@pytest.mark.parametrize("style", ["divided", "turned twice"])
def test_grouped_heads_share_their_keys_and_values(style):
    proto = attention(style, heads=4, kv_heads=2)
    assert "attention_panels" in agrees(proto)
    [found] = match_attention(Body(ts.load(proto)))
    assert (found.geometry.heads, found.geometry.kv_heads) == (4, 2)


def test_several_sequences_attend_to_themselves_only():
    assert "attention_panels" in agrees(attention(mask="keys", batch=3, tokens=32))


@pytest.mark.parametrize("mask", ["none", "keys", "pairs", "causal"])
@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_agrees(monkeypatch, mask, parts):
    monkeypatch.setattr(choose_layout_module, "_parts", lambda *_: parts)
    kernels = agrees(attention(mask=mask, batch=4, tokens=32))
    assert "attention_panels" in kernels


def test_an_encoder_in_parts_agrees_and_checks_its_layers(monkeypatch):
    monkeypatch.setattr(choose_layout_module, "_parts", lambda *_: 3)
    proto = pruned(zoo.bert_encoder(**ENCODER, batch=3, seq=32))
    agrees(proto)
    module = ts.compile(proto, "native", threads=1)
    assert all(row.error_share <= 1 for row in module.report.layers)
    calls = {row.symbol: row.calls for row in module.profile(np.zeros((3, 32, 64), "f4")).kernels}
    assert calls["attention_panels"] == 2 * 3
    assert calls["unpack_panels"] == 1


def test_a_batch_is_cut_where_its_activations_outgrow_the_cache():
    model = ts.load(zoo.bert_encoder(layers=1, hidden=64, heads=4, ffn=256, batch=8, seq=64))
    sites = collect_weights(model)
    gains = {site.site.binding: 1e3 for site in sites}
    widest = 8 * 64 * 256 * 4
    for fits, parts in ((8, 1), (2, 4), (1, 8), (0.5, 1)):
        small = replace(MACHINE, l3_bytes=int(fits * 6 * widest / 8))
        assert choose_layout(Body(model), sites, gains, small).parts == parts


def test_sequences_that_begin_within_a_vector_attend_in_rows():
    assert "attention_panels" not in agrees(attention(batch=3, tokens=20))


def test_scores_that_somebody_reads_are_computed():
    proto = attention("observed")
    assert not list(match_attention(Body(ts.load(proto))))
    agrees(proto)


def test_a_causal_mask_is_known_by_its_values():
    for mask, known in (("causal", True), ("causal of -inf", True), ("pairs", False)):
        model = ts.load(attention(mask=mask))
        plan = ts.plan(model, TARGET, threads=1)
        mod = lower_model(model, collect_weights(model), plan, MACHINE).mod
        masks = [
            len(function.params)
            for name, function in mod.functions_items()
            if name.name_hint == "attention_panels"
        ]
        # Queries, keys and values are one tensor; then the mask, and the result.
        assert masks == [2 if known else 3]


@dataclass(frozen=True)
class Operator:
    """What can be in panels, by the binding of its result, and what it saves there."""

    result: int
    members: frozenset
    inputs: frozenset
    gain: float


def operators_of(body, sites, gains):
    """List the weights and the elementwise chains that no weight's kernel takes in."""
    taken = set()
    for site in sites:
        inputs = frozenset(v.name for v in (site.data, *site.fused.tensors))
        gain = gains[site.site.binding]
        yield Operator(site.fused.result, site.fused.members, inputs, gain)
        taken |= site.fused.members
    for chain in elementwise_chains(body, taken):
        *leading, features = sizes_of(body.bindings[chain.result][0])
        tokens = int(np.prod(leading))
        gain = cost.elementwise_gain(chain.epilogue, tokens, features, MACHINE)
        inputs = frozenset(v.name for v in chain.tensors)
        yield Operator(chain.result, chain.members, inputs, gain)


def sizes_of(variable):
    return [int(d) for d in variable.ty.shape.values]


def price_of(body, operators, chosen):
    """Price a layout: what every operator loses, and a conversion where neighbours differ."""
    total = sum(max(0.0, -op.gain if op.result in chosen else op.gain) for op in operators)
    inside = {index for op in operators for index in op.members}
    variables = {v.name: v for v, _ in body.bindings} | {v.name: v for v in body.function.params}
    values = {name for op in operators for name in op.inputs}
    values |= {body.bindings[op.result][0].name for op in operators}
    for name in values:
        readers = [op.result for op in operators if name in op.inputs]
        outside = not set(body.users.get(name, [])) <= inside
        produced = body.position.get(name, -1) in chosen
        in_panels = any(r in chosen for r in readers)
        in_rows = outside or any(r not in chosen for r in readers)
        if (in_panels and not produced) or (in_rows and produced):
            total += cost.conversion_us(int(np.prod(sizes_of(variables[name]))), MACHINE)
    return total


def residual_chain(tokens):
    """Six layers, some of which add what went in two layers before."""
    g = Layer(tokens=tokens, heads=1, depth=24)
    x = g.linear("x", 24, 24)
    for width in (40, 12):
        inner = g.op("Relu", g.linear(x, 24, width))
        x = g.op("Add", g.linear(inner, width, 24), x)
    g.nodes.append(helper.make_node("Identity", [g.linear(x, 24, 30)], ["y"]))
    return g.proto()


def gated_chain(tokens):
    """Four layers and two chains between them, of values that several read."""
    g = Layer(tokens=tokens, heads=1, depth=24)
    a = g.linear("x", 24, 24)
    b = g.linear(a, 24, 24)
    gate = g.op("Tanh", g.op("Sub", a, g.op("Sigmoid", b)))
    y = g.op("Add", g.linear(gate, 24, 24), g.op("Mul", gate, b))
    g.nodes.append(helper.make_node("Identity", [g.linear(y, 24, 30)], ["y"]))
    return g.proto()


@pytest.mark.parametrize(("network", "chains"), [(residual_chain, 0), (gated_chain, 2)])
@settings(max_examples=60)
@given(
    gains=st.lists(st.floats(-1, 1), min_size=6, max_size=6), tokens=st.sampled_from([8, 40, 43])
)
def test_the_choice_is_the_cheapest_of_all(network, chains, gains, tokens):
    model = ts.load(network(tokens))
    sites, body = collect_weights(model), Body(model)
    by_site = {site.site.binding: gain for site, gain in zip(sites, gains, strict=False)}
    operators = list(operators_of(body, sites, by_site))
    assert len(operators) == len(sites) + chains
    chosen = set(choose_layout(body, sites, by_site, MACHINE).ops)
    results = [op.result for op in operators]
    prices = [
        price_of(body, operators, set(subset))
        for count in range(len(results) + 1)
        for subset in itertools.combinations(results, count)
    ]
    assert price_of(body, operators, chosen) <= min(prices) + 0.02
