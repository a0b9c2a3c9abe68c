"""Panels of activations cover all columns, evenly."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from tvm_sparse.schedules.x86.panel_kernel import share_out

from tvm_sparse.panels import split_evenly


@given(columns=st.integers(1, 5000), nt=st.integers(1, 8), lanes=st.sampled_from([1, 4, 8, 16]))
def test_panels_cover_the_columns_in_as_few_and_as_even_widths_as_can_be(columns, nt, lanes):
    tiles = split_evenly(columns, nt, lanes)
    vectors = -(-columns // lanes)
    assert tiles.full * tiles.nt + tiles.rest * tiles.nt_rest == vectors
    assert tiles.nt <= nt
    assert tiles.total == -(-vectors // nt)
    assert tiles.rest == 0 or tiles.nt_rest == tiles.nt - 1 > 0


@given(
    columns=st.integers(1, 5000),
    nt=st.integers(1, 4),
    splits=st.integers(1, 3),
    threads=st.integers(1, 5),
)
def test_threads_cover_all_columns_between_them(columns, nt, splits, threads):
    tiles = split_evenly(columns, nt, 16)
    shares = share_out(tiles, splits, threads, 16)
    assert len(shares) == threads
    covered = sorted(share for share in shares if share[0] < share[1])
    assert covered[0][0] == 0
    assert covered[-1][1] >= columns
    assert all(before[1] >= after[0] for before, after in pairwise(covered))
