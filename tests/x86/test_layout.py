"""The layout of activations: panels from the first layer to the last, converted where it pays."""

import itertools
import re
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from attention_models import Layer, attention
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from tvm import relax
from tvm_sparse.passes import choose_layout as choose_layout_module
from tvm_sparse.passes.choose_layout import choose_layout
from tvm_sparse.passes.collect_weights import collect_weights
from tvm_sparse.passes.fuse_epilogue import Body
from tvm_sparse.passes.match_attention import match_attention
from tvm_sparse.passes.rewrite_main import bindings_of, call_of
from tvm_sparse.schedules.x86 import cost

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.pipeline import lower_model
from tvm_sparse.targets import machine_of, resolve_target

TARGET = "x86-64-v3"
MACHINE = machine_of(resolve_target(TARGET), 1)
ENCODER = {"layers": 2, "hidden": 64, "heads": 4, "ffn": 128}


def pruned(proto, sparsity=0.8):
    return ts.prune(proto, sparsity=sparsity, scope="layer")


def kernels_of(proto):
    """Kernels in the order of their calls, without their numbers."""
    model = ts.load(proto)
    plan = ts.plan(model, TARGET, threads=1)
    mod = lower_model(model, collect_weights(model), plan, MACHINE).mod
    calls = [b.value for b in bindings_of(mod["main"]) if call_of(b.value, "call_tir")]
    return [re.sub(r"_?\d+$", "", call.args[0].name_hint) for call in calls]


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


def agrees(proto, seed=0):
    module = ts.compile(proto, "native", threads=1)
    rng = np.random.default_rng(seed)
    feed = {i.name: rng.standard_normal(i.shape).astype("float32") for i in module.inputs}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    got = module.run(feed)
    for output, want in zip(session.get_outputs(), session.run(None, feed), strict=True):
        scale = np.abs(want).max()
        np.testing.assert_allclose(got[output.name], want, rtol=0, atol=3e-5 * scale)
    return [row.symbol for row in module.profile(*feed.values()).kernels]


STYLES = ["divided", "multiplied", "both scaled", "turned twice"]


@pytest.mark.parametrize("style", STYLES)
def test_attention_is_found_however_it_is_written(style):
    assert "attention_panels" in agrees(attention(style, "keys"))


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


def chain_cost(model, gains, chosen):
    """Price a layout: what every operator loses, and a conversion where neighbours differ."""
    body = Body(model)
    total = 0.0
    sites = collect_weights(model)
    results = {site.fused.result: site for site in sites}
    inside = {index for site in sites for index in site.fused.members}
    for site in sites:
        gain = gains[site.site.binding]
        total += max(0.0, -gain if site.fused.result in chosen else gain)
    values = {v.name: v for site in sites for v in (site.data, *site.fused.tensors)}
    values |= {body.bindings[r][0].name: body.bindings[r][0] for r in results}
    for name, variable in values.items():
        elements = int(np.prod([int(d) for d in variable.ty.shape.values]))
        readers = [
            r
            for r, site in results.items()
            if name in {v.name for v in (site.data, *site.fused.tensors)}
        ]
        outside = not set(body.users.get(name, [])) <= inside
        produced = body.position.get(name, -1) in chosen
        in_panels = any(r in chosen for r in readers)
        in_rows = outside or any(r not in chosen for r in readers)
        if (in_panels and not produced) or (in_rows and produced):
            total += cost.conversion_us(elements, MACHINE)
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


@settings(max_examples=60)
@given(gains=st.lists(st.floats(-1, 1), min_size=6, max_size=6), tokens=st.sampled_from([8, 40]))
def test_the_choice_is_the_cheapest_of_all(gains, tokens):
    model = ts.load(residual_chain(tokens))
    sites = collect_weights(model)
    assert [len(site.fused.tensors) for site in sites] == [0, 0, 1, 0, 1, 0]
    by_site = {site.site.binding: gain for site, gain in zip(sites, gains, strict=True)}
    chosen = tuple(sorted(choose_layout(Body(model), sites, by_site, MACHINE).ops))
    weights = [site.fused.result for site in sites]
    prices = {
        subset: chain_cost(model, by_site, set(subset))
        for count in range(len(weights) + 1)
        for subset in itertools.combinations(weights, count)
    }
    assert prices[chosen] <= min(prices.values()) + 0.02
