"""Operators on activations in panels: conversions, layer norm and attention against float64."""

import numpy as np
import pytest
from dense_support import EPS, machine, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_sparse.schedules.x86.dense_kernel import UnsupportedShapeError
from tvm_sparse.schedules.x86.panels_attention import (
    AttentionGeometry,
    attention_panels,
)
from tvm_sparse.schedules.x86.panels_convert import pack_panels, unpack_panels
from tvm_sparse.schedules.x86.panels_norm import layer_norm_panels

from tvm_sparse.panels import Panels, Source

LANES = [16, 8, 4]


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def zeros_of(panels, flat, features):
    """The row behind the last feature of every panel."""
    return np.concatenate(
        [
            flat[first * (features + 1) + features * width :][:width]
            for first, width in panels.bounds()
        ]
    )


@given(
    tokens=st.integers(1, 200),
    features=st.integers(1, 40),
    nt=st.integers(1, 4),
    lanes=st.sampled_from(LANES),
)
def test_packing_and_unpacking_keep_every_number(tokens, features, nt, lanes):
    panels = Panels(tokens, nt, lanes)
    rows = draw((tokens, features))
    flat = panels.pack(rows)
    assert flat.shape == (panels.size(features),)
    assert np.array_equal(panels.unpack(flat, features), rows)
    assert not zeros_of(panels, flat, features).any()


@pytest.mark.parametrize("lanes", LANES)
@settings(max_examples=8)
@given(tokens=st.integers(1, 150), features=st.integers(1, 70), nt=st.integers(1, 4))
def test_the_kernels_pack_and_unpack_as_numpy_does(lanes, tokens, features, nt):
    panels, rows = Panels(tokens, nt, lanes), draw((tokens, features))
    cpu = machine(lanes)
    flat = run(pack_panels(panels, features, cpu), lanes, [rows], (panels.size(features),))
    assert np.array_equal(panels.unpack(flat, features), rows)
    assert not zeros_of(panels, flat, features).any()
    back = run(unpack_panels(panels, features, cpu), lanes, [panels.pack(rows)], rows.shape)
    assert np.array_equal(back, rows)


@pytest.mark.parametrize("lanes", LANES)
@settings(max_examples=8)
@given(
    tokens=st.integers(1, 150),
    features=st.sampled_from([1, 3, 64, 65, 130]),
    nt=st.integers(1, 4),
    gamma=st.booleans(),
    beta=st.booleans(),
    centred=st.booleans(),
    offset=st.sampled_from([0.0, 100.0]),
)
def test_norms_agree_with_float64(lanes, tokens, features, nt, gamma, beta, centred, offset):
    panels, x = Panels(tokens, nt, lanes), draw((tokens, features)) + np.float32(offset)
    scale, shift = draw(features, 1), draw(features, 2)
    inputs = [panels.pack(x), *([scale] if gamma else []), *([shift] if beta else [])]
    func = layer_norm_panels(panels, features, machine(lanes), 1e-5, gamma, beta, centred)
    flat = run(func, lanes, inputs, (panels.size(features),))
    wide = x.astype("float64")
    difference = wide - wide.mean(1, keepdims=True) if centred else wide
    deviation = np.sqrt((difference**2).mean(1, keepdims=True) + 1e-5)
    want = difference / deviation * (scale if gamma else 1) + (shift if beta else 0)
    # The mean is off by the rounding of sums of |x|; what is divided by the deviation keeps that.
    off = EPS * (features + 4) * np.abs(wide).mean(1, keepdims=True) / deviation
    bound = (2 * off + EPS * (features + 8) * (np.abs(difference) / deviation + off)) * (
        np.abs(scale) if gamma else 1
    ) + EPS * (np.abs(want) + 1)
    assert np.all(np.abs(panels.unpack(flat, features) - want) <= bound)
    assert not zeros_of(panels, flat, features).any()


def attention64(g, q, k, v, mask):
    """Attention of [batch * tokens, heads * depth] matrices in float64."""

    def heads(rows, count):
        split = rows.astype("float64").reshape(g.batch, g.tokens, count, g.depth)
        return np.repeat(split.transpose(0, 2, 1, 3), g.heads // count, axis=1)

    queries, keys, values = heads(q, g.heads), heads(k, g.kv_heads), heads(v, g.kv_heads)
    scores = g.scale * queries @ keys.swapaxes(2, 3)
    if g.mask == "causal":
        scores = np.where(np.tri(g.tokens, dtype=bool), scores, -np.inf)
    elif mask is not None:
        scores = scores + mask.astype("float64").swapaxes(2, 3)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    # An error of d in the scores is one of up to 2 d in the shares.
    wrong = EPS * (g.depth + 4) * g.scale * np.abs(queries) @ np.abs(keys).swapaxes(2, 3)
    if mask is not None:
        wrong = wrong + EPS * np.abs(np.where(np.isfinite(mask), mask, 0)).swapaxes(2, 3)
    relative = 2 * wrong.max(-1, keepdims=True) + EPS * (g.tokens + 16)
    bound = (relative * shares) @ np.abs(values) + EPS * g.tokens * shares @ np.abs(values)
    merged = (g.batch * g.tokens, g.heads * g.depth)
    return [part.transpose(0, 2, 1, 3).reshape(merged) for part in (shares @ values, bound)]


def mask_for(g):
    if g.mask in ("none", "causal"):
        return None
    shape = (g.mask_batch, g.mask_heads, g.tokens, g.tokens if g.mask == "pairs" else 1)
    mask = draw(shape, 7)
    # Some are masked out, never all keys of a query.
    mask[:, :, 1:][np.random.default_rng(8).random(mask[:, :, 1:].shape) < 0.3] = -np.inf
    return mask


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("kind", ["none", "causal", "keys", "pairs"])
@settings(max_examples=5)
@given(
    batch=st.integers(1, 3),
    tokens=st.sampled_from([1, 3, 15, 16, 17, 48, 80, 100, 112]),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    depth=st.sampled_from([1, 5, 16, 20]),
    nt=st.integers(1, 4),
    together=st.booleans(),
    lead=st.tuples(st.booleans(), st.booleans()),
)
def test_attention_agrees_with_float64(
    lanes, kind, batch, tokens, heads, depth, nt, together, lead
):
    batch = batch if tokens % lanes == 0 else 1
    g = AttentionGeometry(
        batch,
        tokens,
        *heads,
        depth,
        float(np.float32(depth**-0.5)),
        kind,
        batch if lead[0] else 1,
        heads[0] if lead[1] else 1,
    )
    panels = Panels(batch * tokens, nt, lanes)
    widths = [heads[0] * depth, heads[1] * depth, heads[1] * depth]
    parts = [draw((batch * tokens, width), seed) for seed, width in enumerate(widths)]
    if together:
        total = sum(widths)
        firsts = [0, widths[0], widths[0] + widths[1]]
        sources = tuple(Source(0, total, first) for first in firsts)
        inputs = [panels.pack(np.concatenate(parts, 1))]
    else:
        sources = tuple(Source(number, width) for number, width in enumerate(widths))
        inputs = [panels.pack(part) for part in parts]
    mask = mask_for(g)
    func = attention_panels(g, panels, sources, machine(lanes))
    flat = run(func, lanes, inputs + ([] if mask is None else [mask]), (panels.size(widths[0]),))
    want, bound = attention64(g, *parts, mask)
    assert np.all(np.abs(panels.unpack(flat, widths[0]) - want) <= bound)
    assert not zeros_of(panels, flat, widths[0]).any()


def test_attention_of_nan_stays_with_its_query():
    g = AttentionGeometry(1, 32, 1, 1, 8, 1.0)
    panels = Panels(32, 4, 16)
    q, k, v = (draw((32, 8), seed) for seed in range(3))
    q[5] = np.nan
    sources = tuple(Source(number, 8) for number in range(3))
    func = attention_panels(g, panels, sources, machine(16))
    got = panels.unpack(run(func, 16, [panels.pack(p) for p in (q, k, v)], (panels.size(8),)), 8)
    assert np.isnan(got[5]).all()
    assert np.isfinite(np.delete(got, 5, 0)).all()


def test_sequences_that_begin_within_a_vector_are_refused():
    g = AttentionGeometry(2, 20, 1, 1, 8, 1.0)
    sources = (Source(0, 24), Source(0, 24, 8), Source(0, 24, 16))
    with pytest.raises(UnsupportedShapeError, match="begin within a vector"):
        attention_panels(g, Panels(40, 4, 16), sources, machine(16))
