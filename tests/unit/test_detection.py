"""Forms of zeros are recognised, blurred ones too, and random weights have none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_forms import (
    blocky,
    clumped,
    clumped_kernels,
    dense,
    keep,
    n_of_m,
    strewn,
    thinned,
    tile_wise,
    unstructured,
    v_n_m,
)

from tvm_sparse.profile import profile_weight
from tvm_sparse.profile.chance import Null, log_at_least, log_at_most
from tvm_sparse.profile.parts import CHANCE
from tvm_sparse.pruning import parse_pattern
from tvm_sparse.pruning.cutting import Scored, cut_masks
from tvm_sparse.pruning.scores import magnitude

Make = Callable[[int], np.ndarray]

GROUPS = [
    (1, 2),
    (2, 4),
    (1, 4),
    (3, 4),
    (4, 8),
    (2, 8),
    (5, 8),
    (3, 7),
    (8, 16),
    (1, 16),
    (12, 16),
]
SHAPES = [
    *[(4, 1), (8, 1), (16, 1), (32, 1), (64, 1), (1, 4), (1, 8), (1, 16), (1, 32), (1, 64)],
    *[(4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (4, 16), (16, 8)],
]
PAIRS = [(2, 1), (1, 2)]
TILES = [16, 32, 64, 128, 256]
VENOMS = [(16, 2, 8), (32, 2, 8), (64, 2, 8), (64, 2, 16), (128, 2, 10), (64, 2, 32), (128, 1, 8)]


def side(block: tuple[int, int]) -> int:
    """Rows and columns that hold enough of the blocks."""
    return 1024 if block[0] * block[1] >= 1024 else 384


FORMS: dict[str, Make] = {
    **{f"{n}:{m}": lambda seed, n=n, m=m: n_of_m(192, 37 * m, n, m, seed) for n, m in GROUPS},
    **{
        f"block:{b[0]}x{b[1]}": lambda seed, b=b: blocky(side(b), side(b), b, 0.3, seed)
        for b in SHAPES
    },
    # Three tiles of 256, and seven of 128: the last tile is cut.
    **{f"tile-wise:{g}": lambda seed, g=g: tile_wise(1700, 300, g, 0.5, seed) for g in TILES},
    **{
        f"{v}:{n}:{m}": lambda seed, v=v, n=n, m=m: v_n_m(384, 48 * m, v, n, m, seed)
        for v, n, m in VENOMS
    },
    "channel": lambda seed: keep(
        dense(128, 96, seed), np.random.default_rng(seed).random((128, 1)) < 0.4
    ),
}
NAMES = list(FORMS)


def nearly(form: str) -> str:
    """Return the word for a form with a few nonzeros elsewhere."""
    return form.replace("tile-wise", "tew") if form.startswith("tile-wise") else f"nearly {form}"


# ---------------------------------------------------------------------------------------------
# What is there is found
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", NAMES)
def test_a_form_is_named_and_nothing_else(form: str) -> None:
    for seed in range(2):
        profile = profile_weight(FORMS[form](seed))
        assert profile.pattern == form
        (found,) = profile.findings
        assert found.exact and found.violations == 0
        assert found.explained == pytest.approx(1) and found.fill == pytest.approx(1)
        assert found.log10_chance <= math.log10(CHANCE)


@pytest.mark.parametrize("form", NAMES)
def test_zeros_in_what_is_kept_do_not_hide_a_form(form: str) -> None:
    for seed in range(2):
        profile = profile_weight(thinned(FORMS[form](seed), 0.05, seed + 100))
        assert profile.pattern == form
        assert 0.93 < profile.findings[0].fill < 0.97


@pytest.mark.parametrize("form", NAMES)
def test_a_few_nonzeros_elsewhere_are_counted(form: str) -> None:
    for seed in range(2):
        w = FORMS[form](seed)
        extra = max(1, round(0.01 * np.count_nonzero(w)))
        profile = profile_weight(strewn(w, 0.01, seed + 100))
        assert profile.pattern == nearly(form)
        assert not profile.findings[0].exact
        # Blocks of four with two strays are no longer told from kept ones.
        assert profile.findings[0].violations == pytest.approx(extra, rel=0.03)


@pytest.mark.parametrize("form", ["2:4", "block:16x16", "block:1x8", "channel", "64:2:8"])
def test_one_nonzero_elsewhere_is_one_violation(form: str) -> None:
    (found,) = profile_weight(strewn(FORMS[form](0), 0.0)).findings
    assert (found.form, found.violations, found.exact) == (form, 1, False)


@pytest.mark.parametrize("form", ["2:4", "3:7", "block:16x16", "block:4x1", "64:2:8", "channel"])
def test_too_many_nonzeros_elsewhere_end_a_form(form: str) -> None:
    w = strewn(FORMS[form](0), 0.08)
    assert not [found for found in profile_weight(w).findings if found.form == form]


@pytest.mark.parametrize("block", SHAPES)
def test_blocks_are_found_wherever_their_grid_begins(block: tuple[int, int]) -> None:
    extent = side(block)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        offset = tuple(int(rng.integers(each)) for each in block)
        w = blocky(extent, extent, block, 0.3, seed, offset)
        for blurred, near in ((w, ""), (thinned(w), ""), (strewn(w), "nearly ")):
            place = "" if offset == (0, 0) else f"@{offset[0]},{offset[1]}"
            profile = profile_weight(blurred)
            assert profile.pattern == f"{near}block:{block[0]}x{block[1]}{place}"
            assert profile.findings[0].offset == offset


@pytest.mark.parametrize("block", PAIRS)
def test_pairs_are_found_but_strays_make_pairs_too(block: tuple[int, int]) -> None:
    w = blocky(384, 384, block, 0.3)
    for blurred in (w, thinned(w), strewn(w)):
        assert profile_weight(blurred).pattern == f"block:{block[0]}x{block[1]}"


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(8, 1), (1, 8), (8, 8), (16, 4)]),
    st.integers(150, 300),
    st.integers(150, 300),
    st.floats(0.1, 0.6),
    st.integers(0, 10_000),
)
def test_blocks_are_found_in_matrices_of_any_size(
    block: tuple[int, int], rows: int, columns: int, density: float, seed: int
) -> None:
    profile = profile_weight(thinned(blocky(rows, columns, block, density, seed)))
    assert profile.pattern == f"block:{block[0]}x{block[1]}"


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 16), st.data(), st.integers(0, 10_000))
def test_any_n_of_any_m_is_found(m: int, data: st.DataObject, seed: int) -> None:
    # One zero in sixteen is dense already.
    n = data.draw(st.integers(1, m - 1 if m < 16 else 14))
    (found,) = profile_weight(n_of_m(256, 24 * m, n, m, seed)).findings
    divisor = math.gcd(n, m)
    assert found.exact and found.along == "columns"
    # 2:4 is 4:8 as well, and not the other way round.
    assert found.form in {
        f"{n // d}:{m // d}" for d in range(1, divisor + 1) if n % d == m % d == 0
    }
    assert found.form == f"{n}:{m}"


def test_groups_that_the_edge_cuts_may_hold_as_many() -> None:
    w = n_of_m(256, 128, 2, 4)[:, :126]
    assert profile_weight(w).pattern == "2:4"


def test_two_of_four_that_was_pruned_further_is_two_of_four() -> None:
    assert profile_weight(thinned(n_of_m(256, 256, 2, 4), 0.4)).pattern == "2:4"


@pytest.mark.parametrize("n_m", [(2, 4), (3, 7)])
def test_groups_of_channels_are_told_from_groups_of_columns(n_m: tuple[int, int]) -> None:
    n, m = n_m
    lines = n_of_m(64 * 9, 8 * m, n, m).reshape(64, 9, -1).transpose(0, 2, 1)
    (found,) = profile_weight(lines.reshape(64, -1), taps=9).findings
    assert (found.form, found.along) == (f"{n}:{m}", "channels")
    (found,) = profile_weight(strewn(lines.reshape(64, -1)), taps=9).findings
    assert (found.word, found.along) == (f"nearly {n}:{m}", "channels")


@pytest.mark.parametrize("height", TILES)
def test_tiles_without_dropped_rows_are_blocks_up_to_64(height: int) -> None:
    form = f"block:{height}x1" if height <= 64 else f"tile-wise:{height}"
    w = tile_wise(1024, 300, height, 0.5, rows_kept=1.0)
    assert profile_weight(w).pattern == form


@pytest.mark.parametrize("share", [0.002, 0.02, 0.1])
@pytest.mark.parametrize("rows_kept", [0.5, 1.0])
def test_restored_elements_beside_tiles_are_counted(share: float, rows_kept: float) -> None:
    w = tile_wise(1700, 300, 128, 0.5, 0, rows_kept)
    (found,) = profile_weight(strewn(w, share)).findings
    assert found.form == "tew:128"
    assert found.violations == round(share * np.count_nonzero(w))


@pytest.mark.parametrize("tile", [32, 64, 128])
@pytest.mark.parametrize("zeros", [0.75, 0.9])
def test_tiles_are_found_at_their_height_where_they_share_most_columns(
    tile: int, zeros: float
) -> None:
    # Ranked over all tiles together, most columns of uneven weights are kept or dropped everywhere.
    rng = np.random.default_rng(tile)
    weight = dense(768, 512, tile)
    weight *= np.exp(0.4 * rng.standard_normal((768, 1)))
    weight *= np.exp(0.4 * rng.standard_normal(512))
    scored = [Scored(weight[..., None], magnitude(weight[..., None]), weight.shape)]
    [mask] = cut_masks(
        scored, parse_pattern(f"tile-wise:{tile}"), zeros, "global", np.random.default_rng(0)
    )
    pruned = keep(weight, ~mask[..., 0])
    assert profile_weight(pruned).pattern == f"tile-wise:{tile}"


def test_whole_kernels_are_found_though_they_are_blurred() -> None:
    w = blocky(64, 64 * 9, (1, 9), 0.3)
    assert profile_weight(thinned(w), taps=9).pattern == "kernel"
    profile = profile_weight(strewn(w), taps=9)
    assert profile.pattern == "nearly kernel"
    assert profile.findings[0].violations == pytest.approx(0.01 * np.count_nonzero(w), rel=0.03)


def test_rows_and_channels_may_be_dropped_together() -> None:
    rng = np.random.default_rng(0)
    mask = np.outer(rng.random(96) < 0.6, rng.random(80) < 0.5)
    assert profile_weight(keep(dense(96, 80), mask)).pattern == "channel"
    assert profile_weight(strewn(keep(dense(96, 80), mask))).pattern == "nearly channel"


# ---------------------------------------------------------------------------------------------
# What is not there is not found
# ---------------------------------------------------------------------------------------------

DENSITIES = [0.005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.93]
# Of the logarithms of the scales of rows and of columns; those of real weights are the small ones.
SIGMAS = [(0.12, 0.16), (0.3, 0.3), (0.5, 0.7), (1, 1), (0.2, 1.5), (1.5, 0.2), (0, 2), (2, 2)]
SIZES = [
    *[(64, 64), (48, 147), (300, 90), (1, 512), (512, 1), (4, 4), (16, 1024), (128, 128)],
    *[(256, 64), (1000, 64), (64, 576), (17, 96)],
]


def claims(w: np.ndarray, taps: int = 1) -> str:
    profile = profile_weight(w, taps=taps)
    return "" if profile.pattern in {"unstructured", "dense", "zero"} else profile.pattern


@pytest.mark.parametrize("shape", SIZES)
def test_random_weights_have_no_form(shape: tuple[int, int]) -> None:
    taps = 9 if shape[1] % 9 == 0 else 1
    for density in DENSITIES:
        for seed in range(5):
            assert not claims(unstructured(*shape, density, seed), taps), (density, seed)


@pytest.mark.parametrize("sigmas", SIGMAS)
@pytest.mark.parametrize("shape", SIZES)
def test_weights_of_uneven_rows_and_columns_have_no_form(
    shape: tuple[int, int], sigmas: tuple[float, float]
) -> None:
    taps = 9 if shape[1] % 9 == 0 else 1
    for density in DENSITIES:
        for seed in range(2):
            assert not claims(clumped(*shape, density, seed, sigmas), taps), (density, seed)


@pytest.mark.parametrize("shape", [(64, 64), (32, 16), (128, 100)])
def test_convolutions_of_uneven_kernels_have_no_form(shape: tuple[int, int]) -> None:
    for density in DENSITIES:
        for seed in range(3):
            assert not claims(clumped_kernels(*shape, 9, density, seed), 9), (density, seed)


@pytest.mark.parametrize("sigmas", [(0.0, 0.0), (0.12, 0.16), (0.5, 0.7)])
def test_large_random_weights_have_no_form(sigmas: tuple[float, float]) -> None:
    for seed, density in enumerate((0.05, 0.1, 0.25, 0.5, 0.75)):
        assert not claims(clumped(1536, 768, density, seed, sigmas))


@pytest.mark.slow
@pytest.mark.parametrize("sigmas", [None, *SIGMAS])
def test_random_weights_have_no_form_over_many_seeds(sigmas: tuple[float, float] | None) -> None:
    for shape in SIZES:
        for density in DENSITIES:
            for seed in range(1000, 1030):
                w = (
                    clumped(*shape, density, seed, sigmas)
                    if sigmas
                    else unstructured(*shape, density, seed)
                )
                taps = 9 if shape[1] % 9 == 0 and seed % 2 else 1
                assert not claims(w, taps), (shape, density, seed)


# ---------------------------------------------------------------------------------------------
# The probabilities
# ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 400), st.data())
def test_what_a_part_holds_by_chance_is_hypergeometric(size: int, data: st.DataObject) -> None:
    nnz, cells = data.draw(st.integers(0, size)), data.draw(st.integers(1, min(size, 40)))
    every = math.comb(size, cells)
    exact = [
        math.comb(nnz, held) * math.comb(size - nnz, cells - held) / every
        for held in range(cells + 1)
    ]
    null = Null(size, nnz)
    np.testing.assert_allclose(null.held(cells), exact, rtol=1e-7, atol=1e-300)
    assert math.exp(null.log_empty(cells)) == pytest.approx(exact[0], rel=1e-7)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.floats(0.01, 0.99), st.data())
def test_bounds_are_above_the_tails_of_the_binomial(n: int, p: float, data: st.DataObject) -> None:
    found = data.draw(st.integers(0, n))
    chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    assert math.exp(log_at_least(found, n * p)) >= sum(chances[found:]) * (1 - 1e-9)
    assert math.exp(log_at_most(found, n * p)) >= sum(chances[: found + 1]) * (1 - 1e-9)


# ---------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda r, c: unstructured(r, c, 0.1, 0),
        lambda r, c: blocky(r, c, (16, 16), 0.2, 0, (7, 3)),
        lambda r, c: strewn(blocky(r, c, (4, 1), 0.2)),
        lambda r, c: strewn(tile_wise(r, c, 128, 0.5)),
        lambda r, c: strewn(n_of_m(r, c, 8, 16)),
        lambda r, c: v_n_m(r, c, 64, 2, 8),
    ],
    ids=["unstructured", "blocks", "nearly vectors", "tew", "nearly 8:16", "v:n:m"],
)
def test_two_hundred_megabytes_take_less_than_three_seconds(
    make: Callable[[int, int], np.ndarray],
) -> None:
    w = make(4096, 12288)
    start = time.process_time()
    profile_weight(w)
    assert time.process_time() - start < 3
