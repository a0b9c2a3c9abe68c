"""Spy plots: what they count, in which order, how large they get, and what is no picture."""

from __future__ import annotations

import base64
import zlib
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import CASES, as_packed, random_matrix, special_matrices

from tvm_sparse.formats import FORMATS, PackedOrder
from tvm_sparse.formats.spies import packed_spy, spy
from tvm_sparse.spy import LEVELS, Spy, cells_of


def levels(picture: Spy) -> np.ndarray:
    return np.frombuffer(picture.levels(), np.uint8).reshape(picture.height, picture.width)


def reordered(weight: np.ndarray, order: PackedOrder) -> np.ndarray:
    """Which slots and places hold a nonzero."""
    held = np.zeros((order.rows.shape[1], weight.shape[1]), np.int64)
    for slot, place in order.nonzeros(weight):
        np.add.at(held, (slot, place), 1)
    return held


# ---------------------------------------------------------------------------------------------
# The order of a format
# ---------------------------------------------------------------------------------------------


def check_order(name: str, config: dict[str, int], weight: np.ndarray) -> None:
    packed = FORMATS[name].pack(weight, config)
    order = FORMATS[name].order(packed)
    if order is None:
        return
    assert order.rows.ndim == 2
    for rows in order.rows:
        assert sorted(row for row in rows if row < len(weight)) == list(range(len(weight)))
    held = reordered(weight, order)
    assert held.max(initial=0) <= 1, "two nonzeros in one place"
    # Each order of rows keeps every row's own nonzeros.
    begins = range(0, weight.shape[1], order.block if len(order.rows) > 1 else weight.shape[1])
    for number, (rows, first) in enumerate(zip(order.rows, begins, strict=True)):
        last = begins[number + 1] if number + 1 < len(begins) else weight.shape[1]
        for slot, row in enumerate(rows):
            own = weight[row, first:last] if row < len(weight) else np.zeros(0)
            assert held[slot, first:last].sum() == np.count_nonzero(own)


@pytest.mark.parametrize(("name", "config"), CASES)
@pytest.mark.parametrize("kind", list(special_matrices()))
def test_an_order_moves_every_nonzero_of_special_matrices(
    name: str, config: dict[str, int], kind: str
) -> None:
    check_order(name, config, as_packed(name, special_matrices()[kind]))


@pytest.mark.parametrize(("name", "config"), CASES)
@settings(max_examples=8)
@given(st.integers(1, 40), st.integers(1, 70), st.floats(0, 1), st.integers(0, 99))
def test_an_order_moves_every_nonzero_of_random_matrices(
    name: str, config: dict[str, int], rows: int, columns: int, density: float, seed: int
) -> None:
    check_order(name, config, as_packed(name, random_matrix(rows, columns, density, seed)))


def test_columns_that_nobody_needs_are_left_out_of_their_block() -> None:
    weight = np.zeros((4, 12), np.float32)
    weight[0, 5], weight[1, 7], weight[2, 11] = 1, 2, 3
    order = PackedOrder(np.array([[0, 1, 2, 3]]), together=2, block=6)
    assert [list(np.flatnonzero(row)) for row in reordered(weight, order)] == [[0], [6], [6], []]


def test_columns_of_a_run_stay_together() -> None:
    weight = np.zeros((1, 12), np.float32)
    weight[0, [4, 11]] = 1
    order = PackedOrder(np.array([[0]]), run=3)
    assert list(np.flatnonzero(reordered(weight, order)[0])) == [1, 5]


def test_channels_that_were_pruned_leave_a_corner_behind() -> None:
    weight = np.zeros((8, 18), np.float32)
    weight[np.ix_([1, 4, 6], range(6, 12))] = 1
    packed = FORMATS["compact_channels"].pack(weight, {"mr": 4, "taps": 3})
    order = FORMATS["compact_channels"].order(packed)
    assert order is not None
    expected = np.zeros((8, 18), int)
    expected[:3, :6] = 1
    assert np.array_equal(reordered(weight, order), expected)


def test_many_rows_are_reordered_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_matrix(37, 50, 0.2, 0)
    packed = FORMATS["register_tiled"].pack(weight, {"mr": 4, "kb": 16})
    order = FORMATS["register_tiled"].order(packed)
    assert order is not None
    whole = reordered(weight, order)
    monkeypatch.setattr("tvm_sparse.formats.order._AT_ONCE", 1)
    assert len(list(order.nonzeros(weight))) == 10
    assert np.array_equal(reordered(weight, order), whole)


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 20000))
def test_cells_are_as_many_as_allowed_and_no_more(rows: int, columns: int, most: int) -> None:
    height, width = cells_of(rows, columns, most)
    assert 1 <= height <= rows and 1 <= width <= columns
    assert height * width <= most
    assert (
        rows * columns > most
        or max(rows, columns) > 4 * most**0.5
        or height * width == (rows * columns)
    )


def test_a_small_matrix_is_drawn_element_by_element() -> None:
    weight = np.array([[0, -0.0, 2], [np.nan, 0, np.inf]], np.float32)
    picture = spy(weight, 100)
    assert picture.densest == 1.0
    assert np.array_equal(levels(picture) > 0, weight != 0)


def test_cells_are_as_dark_as_they_are_dense() -> None:
    weight = np.zeros((20, 40), np.float32)
    weight[:10, :20] = 1
    weight[:10:4, 20:] = 1
    weight[10, 0] = 1
    picture = spy(weight, 8)
    assert (picture.height, picture.width) == (2, 4)
    found = levels(picture)
    assert list(found[0]) == [15, 15, 8, 8]
    assert list(found[1]) == [2, 0, 0, 0]
    assert picture.densest == 1.0


def test_a_weight_of_zeros_is_white() -> None:
    picture = spy(np.zeros((50, 50), np.float32), 16)
    assert picture.densest == 0 and not levels(picture).any()


def test_in_packed_order_the_same_number_of_nonzeros_is_drawn() -> None:
    weight = random_matrix(32, 64, 0.3, 1)
    order = PackedOrder(np.arange(32)[::-1][None])
    picture = packed_spy(weight, order, 32 * 64)
    assert (levels(picture) > 0).sum() == np.count_nonzero(weight)
    # Every row alone: its nonzeros fill the left.
    assert [list(row > 0) for row in levels(picture)] == [
        [True] * n + [False] * (64 - n) for n in np.count_nonzero(weight, axis=1)[::-1]
    ]


def test_a_picture_takes_half_a_byte_a_cell_at_most_and_comes_back() -> None:
    noise = np.random.default_rng(0).integers(0, LEVELS, 128 * 128).astype(np.uint8).tobytes()
    picture = Spy.of(128, 128, 0.5, noise)
    assert picture.levels() == noise
    assert len(base64.b64decode(picture.cells)) < 128 * 128 * 0.53
    assert Spy.from_data(asdict(picture)) == picture


GOOD = Spy.of(2, 3, 0.5, bytes(6))
LONG = Spy.of(64, 64, 0.5, np.random.default_rng(0).integers(0, 16, 4096, np.uint8).tobytes())


@pytest.mark.parametrize(
    "bad",
    [
        replace(GOOD, height=3),
        replace(GOOD, cells="<img>"),
        replace(LONG, cells=LONG.cells[:400]),
        Spy.of(2, 3, 0.5, bytes([0, 1, 2, 3, 4, LEVELS])),
        replace(GOOD, cells=base64.b64encode(zlib.compress(bytes(10**7))).decode()),
    ],
    ids=["too few", "no base64", "cut off", "too dark", "a bomb"],
)
def test_what_is_no_picture_is_refused(bad: Spy) -> None:
    with pytest.raises(ValueError, match="picture"):
        Spy.from_data(asdict(bad))
