"""Each pattern's law, in every scope and by every score, on bare weights."""

from __future__ import annotations

import math
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_sparse.errors import SparseError
from tvm_sparse.pruning import erk_densities, parse_pattern
from tvm_sparse.pruning.budgets import check_scope, share_of
from tvm_sparse.pruning.cutting import Scored, cut_masks
from tvm_sparse.pruning.scores import magnitude
from tvm_sparse.pruning.tile_wise import tile_cuts

FAST = settings(max_examples=40, deadline=None)

PATTERNS = (
    "unstructured",
    "2:4",
    "4:2:8",
    "block:2x3",
    "vector:4",
    "vector:1x4",
    "kernel",
    "channel",
    "tile-wise:4",
    "tile-wise:4+10%",
)

sizes = st.tuples(st.integers(1, 23), st.integers(1, 23), st.sampled_from([1, 4, 9]))
shares = st.one_of(st.sampled_from([0.0, 0.5, 0.9]), st.floats(0, 0.99))
seeds = st.integers(0, 2**16)


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cut(weights, pattern, share=0.5, scope="global", seed=0):
    parsed = parse_pattern(pattern)
    share = share if parsed.implied is None else parsed.implied
    scored = [Scored(w, magnitude(w), w.shape) for w in weights]
    return cut_masks(scored, parsed, share, scope, np.random.default_rng(seed))


@FAST
@given(sizes, st.integers(1, 9), shares, seeds)
def test_a_row_vector_is_a_block_of_one_row(shape, length, share, seed):
    weight = gaussian(seed, *shape)
    [vector] = cut([weight], f"vector:1x{length}", share)
    [block] = cut([weight], f"block:1x{length}", share)
    assert np.array_equal(vector, block)
    runs = [
        vector.reshape(shape[0], -1)[:, c : c + length] for c in range(0, vector[0].size, length)
    ]
    assert all((run == run[:, :1]).all() for run in runs)
    assert sum(int(run[:, 0].sum()) for run in runs) == round(share * (shape[0] * len(runs)))


@FAST
@given(sizes, shares, seeds)
def test_kernels_go_as_a_whole_and_in_the_exact_number(shape, share, seed):
    weight = gaussian(seed, *shape)
    [mask] = cut([weight], "kernel", share)
    assert (mask == mask[:, :, :1]).all()
    assert mask[:, :, 0].sum() == round(share * (shape[0] * shape[1]))
    norms = np.square(weight).sum(axis=2)
    gone = mask[:, :, 0]
    if gone.any() and not gone.all():
        assert norms[gone].max() <= norms[~gone].min() * (1 + 1e-6)


@FAST
@given(
    sizes,
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(4, 11),
    seeds,
)
def test_v_n_m_keeps_four_columns_of_a_block_and_n_of_them_in_each_row(shape, v, n, m, seed):
    if n >= m:
        return
    weight = gaussian(seed, *shape)
    [mask] = cut([weight], f"{v}:{n}:{m}")
    kept = ~mask
    for row in range(0, shape[0], v):
        for column in range(0, shape[1], m):
            block = kept[row : row + v, column : column + m]
            width = block.shape[1]
            assert (block.any(axis=0).sum(axis=0) <= 4).all()
            assert (block.sum(axis=1) == min(n, width)).all()


def test_v_n_m_keeps_the_columns_that_weigh_most_in_the_whole_block():
    weight = np.full((2, 8, 1), 0.1, np.float32)
    weight[:, [1, 3, 4, 7]] = 1.0
    weight[0, 0] = 2.0  # large in one row only: 4 columns of sum 2 beat sums of squares up to 4.01
    [mask] = cut([weight], "2:2:8")
    assert not mask[0, 0, 0]
    assert mask[:, [2, 5, 6]].all()
    assert (~mask).sum() == 4


@FAST
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3),
    st.integers(1, 9),
    shares,
    seeds,
)
def test_every_tile_is_dense_in_its_kept_features_and_columns(shapes, tile, share, seed):
    scores = [np.abs(gaussian(seed + i, *shape)) for i, shape in enumerate(shapes)]
    dead = [np.zeros(shape, bool) for shape in shapes]
    cuts = tile_cuts(scores, dead, tile, share, np.random.default_rng(seed))
    for found in cuts:
        left = np.setdiff1d(np.arange(found.cut.shape[0]), found.kept)
        assert found.cut[left].all()
        for start in range(0, found.kept.size, tile):
            members = found.cut[found.kept[start : start + tile]]
            assert (members == members[:1]).all()
    # Units differ in size: a feature of the largest matrix, or a column of a tile.
    total = sum(s.size for s in scores)
    largest = max(*(s.shape[1] for s in scores), tile)
    gone = sum(int(found.cut.sum()) for found in cuts)
    assert abs(gone - share * total) <= largest + 1


def test_tiles_rank_features_and_columns_of_all_layers_together():
    small, large = 0.1 * gaussian(0, 32, 32, 1), gaussian(1, 32, 32, 1)
    one, other = cut([small, large], "tile-wise:8", 0.5)
    assert one.mean() > 0.8 > 0.2 > other.mean()
    alone = cut([small, large], "tile-wise:8", 0.5, "layer")
    assert all(abs(mask.mean() - 0.5) < 0.04 for mask in alone)


@FAST
@given(st.integers(8, 40), st.integers(8, 40), st.floats(0.1, 0.8), st.integers(1, 15), seeds)
def test_restored_elements_are_the_most_important_of_those_that_were_cut(
    rows, columns, share, percent, seed
):
    weight = gaussian(seed, rows, columns, 1)
    [mask] = cut([weight], f"tile-wise:8+{percent}%", share)
    [tiles] = cut([weight], "tile-wise:8", share / (1 - percent / 100))
    assert not (mask & ~tiles).any()
    assert mask.sum() == min(tiles.sum(), round(share * weight.size))
    back = tiles & ~mask
    if back.any() and mask.any():
        assert np.abs(weight[back]).min() >= np.abs(weight[mask]).max()


@FAST
@given(st.lists(sizes, min_size=1, max_size=5), st.floats(0.01, 1.0))
def test_erk_densities_add_up_and_follow_the_sums_of_dimensions(dims, density):
    densities = erk_densities(dims, density)
    sizes = [math.prod(shape) for shape in dims]
    kept = sum(d * size for d, size in zip(densities, sizes, strict=True))
    assert kept == pytest.approx(density * sum(sizes))
    assert all(0 <= d <= 1 + 1e-9 for d in densities)
    raw = [sum(shape) / size for shape, size in zip(dims, sizes, strict=True)]
    scales = [d / r for d, r in zip(densities, raw, strict=True)]
    # What is not kept dense shares one factor, and what is dense would get more with it.
    free = [s for s, d in zip(scales, densities, strict=True) if d < 1 - 1e-9]
    assert all(a == pytest.approx(b) for a, b in pairwise(free))
    assert all(s <= free[0] * (1 + 1e-6) for s in scales if free)


def test_erk_gives_the_published_densities():
    # Rigging the Lottery, section 3: 3x3 convolutions of 64 to 64 and 512 to 512 channels.
    narrow, wide = erk_densities([(64, 64, 3, 3), (512, 512, 3, 3)], 0.1)
    assert narrow / wide == pytest.approx(((64 + 64 + 6) / 64**2) / ((512 + 512 + 6) / 512**2))


@FAST
@given(st.lists(sizes, min_size=1, max_size=4), shares, seeds)
def test_erk_scope_cuts_each_layer_to_its_density(shapes, share, seed):
    weights = [gaussian(seed + i, *shape) for i, shape in enumerate(shapes)]
    masks = cut(weights, "unstructured", share, "erk")
    densities = erk_densities([w.shape for w in weights], 1.0 - share)
    for mask, density in zip(masks, densities, strict=True):
        assert mask.sum() == round((1.0 - density) * mask.size)


@FAST
@given(sizes, shares, seeds)
def test_row_scope_cuts_the_same_number_in_every_row(shape, share, seed):
    [mask] = cut([gaussian(seed, *shape)], "unstructured", share, "row")
    assert (mask.sum(axis=(1, 2)) == round(share * (shape[1] * shape[2]))).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_seed_decides_between_equals_and_nothing_else(pattern):
    level = [np.ones((12, 16, 4), np.float32), np.ones((8, 8, 1), np.float32)]
    first, again, other = (cut(level, pattern, 0.5, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    weights = [gaussian(0, 12, 16, 4), gaussian(1, 8, 8, 1)]
    one, two = (cut(weights, pattern, 0.5, seed=seed) for seed in (3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_zeros_go_first_and_infinities_last_in_every_type(pattern, dtype):
    weight = gaussian(0, 8, 8, 4).astype(dtype)
    weight[0] = -0.0
    weight[4, 0, 0] = np.nan
    weight[5, 1, 1] = -np.inf
    [mask] = cut([weight], pattern, 0.5)
    implied = parse_pattern(pattern).implied
    assert abs(mask.mean() - (0.5 if implied is None else implied)) < 0.04
    if implied is None:
        # A tile's column holds other rows than the one of zeros.
        assert mask[0].all() or pattern.startswith(("tile", "block", "vector"))
    assert not mask[4, 0, 0]
    assert not mask[5, 1, 1]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(0, 4, 1), (4, 0, 9), (1, 1, 1)])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_empty_and_single_weights_are_no_trouble(pattern, shape, scope):
    masks = cut([np.ones(shape, np.float32), gaussian(0, 8, 8, 1)], pattern, 0.5, scope)
    assert [mask.shape for mask in masks] == [shape, (8, 8, 1)]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("4:2", "N below M"),
        ("0:2:8", "V is at least 1"),
        ("8:4:8", "N below 4"),
        ("8:2:3", "M at least 4"),
        ("vector:2x3", "one row or one column"),
        ("vector:1x0", "at least one element"),
        ("tile-wise:0", "at least one feature"),
        ("tile-wise:8+100%", "below 100%"),
        ("tile-wise", "unknown pattern 'tile-wise'"),
    ],
)
def test_patterns_that_make_no_sense_are_refused_in_words(pattern, words):
    with pytest.raises(SparseError, match=words):
        parse_pattern(pattern)


def test_what_cannot_be_reached_is_refused_in_words():
    with pytest.raises(SparseError, match="restore less"):
        share_of(parse_pattern("tile-wise:8+20%"), "tile-wise:8+20%", 0.9)
    with pytest.raises(SparseError, match=r"8:2:16 leaves 0\.875 zero by itself"):
        share_of(parse_pattern("8:2:16"), "8:2:16", 0.5)
    with pytest.raises(SparseError, match="channel cuts across rows"):
        check_scope("row", parse_pattern("channel"), "channel", "magnitude")
