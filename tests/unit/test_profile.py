"""Profiles: the counts are exact, and a pattern is claimed only where chance does not make it."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_forms import blocky, clumped, dense, keep, n_of_m, unstructured

from tvm_sparse.dtypes import numpy_dtype
from tvm_sparse.errors import ModelError
from tvm_sparse.profile import (
    BLOCK_SHAPES,
    NM_PATTERNS,
    TILE_HEIGHTS,
    TILE_RUN,
    SparsityProfile,
    profile_weight,
)


def by_hand(w: np.ndarray, height: int, width: int) -> tuple[int, int, int]:
    """Blocks, occupied blocks and the cells of those, counted one by one."""
    blocks = occupied = cells = 0
    for top in range(0, w.shape[0], height):
        for left in range(0, w.shape[1], width):
            part = w[top : top + height, left : left + width]
            blocks += 1
            if np.any(part != 0):
                occupied += 1
                cells += part.size
    return blocks, occupied, cells


shapes = st.tuples(st.integers(1, 70), st.integers(1, 70))


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from([0.0, 0.03, 0.3, 0.9, 1.0]), st.integers(0, 2**32 - 1))
def test_every_count_agrees_with_counting_by_hand(
    shape: tuple[int, int], density: float, seed: int
) -> None:
    w = unstructured(*shape, density, seed)
    profile = profile_weight(w)
    rows, columns = np.count_nonzero(w, axis=1), np.count_nonzero(w, axis=0)
    assert profile.nnz == np.count_nonzero(w)
    assert profile.density == pytest.approx(profile.nnz / w.size)
    for stats, counts in ((profile.row_nnz, rows), (profile.column_nnz, columns)):
        assert (stats.min, stats.max) == (counts.min(), counts.max())
        assert stats.mean == pytest.approx(counts.mean())
        assert stats.cv == pytest.approx(counts.std() / counts.mean() if counts.any() else 0)
    assert profile.empty_rows == np.sum(rows == 0)
    assert profile.empty_columns == profile.empty_channels == np.sum(columns == 0)
    assert profile.empty_kernels is None
    for height, width in BLOCK_SHAPES:
        blocks, occupied, cells = by_hand(w, height, width)
        fit = profile.block(height, width)
        assert (fit.blocks, fit.occupied, fit.covered) == (blocks, occupied, cells)
        assert fit.fill == pytest.approx(profile.nnz / cells if cells else 0)
    for fit in profile.nm:
        groups = [
            np.count_nonzero(row[start : start + fit.m])
            for row in w
            for start in range(0, w.shape[1], fit.m)
        ]
        assert fit.groups == len(groups)
        assert fit.violations == sum(count > fit.n for count in groups)
        assert fit.holds == (fit.violations == 0)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 20), st.sampled_from([2, 9, 25]), st.integers(0, 2**32 - 1)
)
def test_convolutions_count_kernels_channels_and_groups_of_channels(
    rows: int, channels: int, taps: int, seed: int
) -> None:
    w = unstructured(rows, channels * taps, 0.05, seed)
    profile = profile_weight(w, taps=taps)
    cube = w.reshape(rows, channels, taps)
    assert profile.empty_channels == np.sum(~cube.any(axis=(0, 2)))
    assert profile.empty_kernels == np.sum(~cube.any(axis=2))
    assert [(fit.n, fit.m) for fit in profile.nm if fit.along == "channels"] == list(NM_PATTERNS)
    for fit in profile.nm:
        if fit.along == "channels":
            lines = cube.transpose(0, 2, 1).reshape(-1, channels)
            counts = [
                np.count_nonzero(line[start : start + fit.m])
                for line in lines
                for start in range(0, channels, fit.m)
            ]
            assert (fit.groups, fit.violations) == (len(counts), sum(c > fit.n for c in counts))


def test_counts_do_not_depend_on_how_rows_are_cut_into_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w = unstructured(333, 45, 0.1, 3)
    whole = profile_weight(w, taps=9)
    monkeypatch.setattr("tvm_sparse.profile.counts._CHUNK_CELLS", 45 * 40)
    assert profile_weight(w, taps=9) == whole


@pytest.mark.parametrize(
    ("w", "pattern"),
    [
        (dense(64, 64), "dense"),
        (unstructured(256, 256, 0.97, 0), "dense"),
        (np.zeros((64, 64), np.float32), "zero"),
        (np.zeros((0, 64), np.float32), "empty"),
        (np.zeros((64, 0), np.float32), "empty"),
        (unstructured(256, 256, 0.1, 0), "unstructured"),
        (np.eye(256, dtype=np.float32), "unstructured"),
        (n_of_m(64, 64, 2, 4), "2:4"),
        (n_of_m(64, 64, 1, 4), "1:4"),
        (n_of_m(64, 64, 4, 8), "4:8"),
        (blocky(256, 256, (4, 1), 0.2), "block:4x1"),
        (blocky(256, 256, (8, 1), 0.2), "block:8x1"),
        (blocky(256, 256, (16, 1), 0.2), "block:16x1"),
        (blocky(256, 256, (1, 16), 0.2), "block:1x16"),
        (blocky(256, 256, (16, 16), 0.2), "block:16x16"),
        (blocky(512, 512, (32, 32), 0.2), "block:32x32"),
        (blocky(509, 251, (16, 16), 0.2), "block:16x16"),
        (blocky(250, 256, (4, 1), 0.9), "block:4x1"),
        (keep(dense(64, 64), np.arange(64)[:, None] % 3 == 0), "channel"),
        (keep(dense(64, 64), np.arange(64) % 2 == 0), "channel"),
        (keep(dense(64, 64), np.arange(64)[:, None] == 5), "channel"),
    ],
)
def test_patterns_made_by_hand_are_named(w: np.ndarray, pattern: str) -> None:
    assert profile_weight(w).pattern == pattern


def test_whole_kernels_of_a_convolution_are_named() -> None:
    assert profile_weight(blocky(64, 64 * 9, (1, 9), 0.3), taps=9).pattern == "kernel"


def test_an_input_channel_of_a_convolution_is_all_of_its_taps() -> None:
    w = keep(dense(32, 32 * 9), np.repeat(np.arange(32) % 2 == 0, 9))
    profile = profile_weight(w, taps=9)
    assert (profile.pattern, profile.empty_channels, profile.empty_columns) == ("channel", 16, 144)


def test_two_of_four_along_channels_is_named_though_it_breaks_along_columns() -> None:
    along_channels = n_of_m(32 * 9, 64, 2, 4).reshape(32, 9, 64).transpose(0, 2, 1)
    profile = profile_weight(along_channels.reshape(32, -1), taps=9)
    assert profile.pattern == "2:4"
    assert [fit.along for fit in profile.nm if fit.holds] == ["channels"] * 2


@pytest.mark.parametrize("density", [0.02, 0.1, 0.3, 0.5, 0.8, 0.93])
@pytest.mark.parametrize("make", [unstructured, clumped])
@pytest.mark.parametrize("shape", [(64, 64), (48, 147), (300, 90), (1, 512), (512, 1), (4, 4)])
def test_random_and_clumped_weights_claim_nothing(
    make, shape: tuple[int, int], density: float
) -> None:
    taps = 9 if shape[1] % 9 == 0 else 1
    for seed in range(12):
        profile = profile_weight(make(*shape, density, seed), taps=taps)
        allowed = {"unstructured", "zero"} | ({"dense"} if profile.density >= 0.95 else set())
        assert profile.pattern in allowed, (seed, profile)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.floats(0.1, 0.9), st.integers(0, 2**32 - 1))
def test_tiny_matrices_are_too_small_to_claim_anything(
    rows: int, columns: int, density: float, seed: int
) -> None:
    w = unstructured(rows, columns, density, seed)
    assert profile_weight(w).pattern in {"unstructured", "dense", "zero"}


def test_one_violation_ends_n_of_m_but_for_nearly() -> None:
    w = n_of_m(64, 64, 2, 4)
    w[10, 20:24] = 1
    profile = profile_weight(w)
    assert [fit.violations for fit in profile.nm if (fit.n, fit.m) == (2, 4)] == [1]
    assert profile.pattern == "nearly 2:4"
    assert [(found.form, found.violations) for found in profile.findings] == [("2:4", 2)]


def test_a_few_zeros_inside_blocks_do_not_hide_them() -> None:
    w = blocky(256, 256, (16, 16), 0.3)
    w[np.random.default_rng(1).random(w.shape) < 0.03] = 0
    assert profile_weight(w).pattern == "block:16x16"


def test_scattered_nonzeros_between_blocks_end_them() -> None:
    w = blocky(256, 256, (16, 16), 0.3)
    w[np.random.default_rng(1).random(w.shape) < 0.02] = 1
    assert not profile_weight(w).pattern.startswith("block:16x16")


def test_blocks_off_the_grid_are_named_with_their_place() -> None:
    w = np.roll(blocky(256, 256, (16, 16), 0.3), 7, axis=0)
    assert profile_weight(w).pattern == "block:16x16@7,0"


def test_minus_zero_is_zero_and_nan_and_inf_are_not() -> None:
    w = np.array([[-0.0, np.nan, np.inf, -np.inf, 0.0, 1.0]], np.float32)
    assert profile_weight(w).nnz == 4


def test_nothing_depends_on_layout_or_type() -> None:
    w = unstructured(40, 60, 0.2, 0)
    expected = profile_weight(w).to_dict() | {"dtype": None}
    for same in (np.asfortranarray(w), np.repeat(w, 2, axis=1)[:, ::2], w.astype(np.float64)):
        assert profile_weight(same).to_dict() | {"dtype": None} == expected
    assert profile_weight((w != 0).astype(np.int8)).nnz == np.count_nonzero(w)
    assert profile_weight(w.astype(np.float16)).dtype == "float16"


def test_tiles_tell_how_often_tensor_cores_list_a_column() -> None:
    two_of_four = np.tile(np.eye(4, dtype=np.float16)[:, [0, 0, 1, 2]] != 0, (32, 64))
    fit = profile_weight(two_of_four.astype(np.float16)).tile(128)
    assert (fit.columns, fit.listed) == (256, (1.0, 1.0))
    single, in_runs = profile_weight(two_of_four.astype(np.float32)).tile(128).listed
    assert single < 1.02 and in_runs == 2.0
    full = profile_weight(np.ones((128, 256), np.float16)).tile(64)
    assert (full.full_columns, full.full_run_columns) == (512, 512)
    assert (full.listed, full.rest_listed) == ((2.0, 2.0), (1.0, 1.0))


def test_the_weight_is_left_as_it_was() -> None:
    w = unstructured(40, 60, 0.2, 0)
    w.flags.writeable = False
    before = w.copy()
    profile_weight(w)
    np.testing.assert_array_equal(w, before)


def test_a_profile_is_plain_data() -> None:
    profile = profile_weight(unstructured(40, 60, 0.2, 0), taps=3)
    data = json.loads(json.dumps(profile.to_dict()))
    assert data["shape"] == [40, 60]
    assert data["pattern"] == "unstructured"
    assert data["row_nnz"]["max"] == profile.row_nnz.max
    assert len(data["blocks"]) == len(BLOCK_SHAPES)


def test_profiles_of_equal_weights_are_equal_and_frozen() -> None:
    w = unstructured(40, 60, 0.2, 0)
    profile: SparsityProfile = profile_weight(w)
    assert profile == profile_weight(w.copy())
    with pytest.raises(AttributeError):
        profile.nnz = 0  # type: ignore[misc]


def test_a_block_shape_that_is_not_profiled_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        profile_weight(dense(4, 4)).block(3, 3)


@pytest.mark.parametrize(
    ("w", "taps", "words"),
    [
        (np.zeros((2, 3, 4), np.float32), 1, "as a matrix"),
        (np.zeros((2, 10), np.float32), 9, "channels of 9 taps"),
        (np.zeros((2, 10), np.float32), 0, "channels of 0 taps"),
        (np.array([["a"]]), 1, "cannot be profiled"),
    ],
)
def test_what_is_no_weight_is_refused_in_words(w: np.ndarray, taps: int, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        profile_weight(w, taps=taps)


def test_forty_megabytes_take_well_under_a_second_per_core() -> None:
    w = unstructured(2000, 5000, 0.1, 0)
    start = time.process_time()
    profile_weight(w)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_has_the_same_zeros(dtype):
    w = unstructured(40, 60, 0.2, 0).astype(numpy_dtype(dtype))
    w[0, :5] = [-0.0, np.nan, np.inf, -np.inf, 0.0]
    # How tensor cores want columns depends on the type.
    varying = {"dtype": None, "tiles": None}
    expected = profile_weight(w.astype(np.float32)).to_dict() | varying
    assert profile_weight(w).to_dict() | varying == expected
    assert profile_weight(w[:1, :5]).nnz == 3


@pytest.mark.parametrize("height", TILE_HEIGHTS)
def test_tiles_count_what_their_rows_need(height):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((600, 48)) * (rng.random((600, 48)) < 0.02)
    w[:, 5] = 1
    w[::3] = 0
    filled = w[w.any(axis=1)]
    tiles = [filled[i : i + height] != 0 for i in range(0, len(filled), height)]
    fit = profile_weight(w).tile(height)
    assert fit.tiles == len(tiles)
    assert fit.columns == sum(int(t.any(axis=0).sum()) for t in tiles)
    runs = [t.any(axis=0).reshape(-1, TILE_RUN).any(axis=1) for t in tiles]
    assert fit.run_columns == TILE_RUN * sum(int(r.sum()) for r in runs)
    full = [t.sum(axis=0) > height // 2 for t in tiles]
    assert fit.full_columns == sum(int(f.sum()) for f in full)
    assert fit.full_nnz == sum(int(t[:, f].sum()) for t, f in zip(tiles, full, strict=True))
