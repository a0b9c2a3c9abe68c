"""Panels of activations cover all columns, evenly."""

from hypothesis import given
from hypothesis import strategies as st
from tvm_sparse.schedules.x86.panel_kernel import split_columns


@given(columns=st.integers(1, 5000), nt=st.integers(1, 8), lanes=st.sampled_from([1, 4, 8, 16]))
def test_panels_cover_the_columns_in_as_few_and_as_even_widths_as_can_be(columns, nt, lanes):
    tiles = split_columns(columns, nt, lanes)
    vectors = -(-columns // lanes)
    assert tiles.full * tiles.nt + tiles.rest * tiles.nt_rest == vectors
    assert tiles.nt <= nt
    assert tiles.total == -(-vectors // nt)
    assert tiles.rest == 0 or tiles.nt_rest == tiles.nt - 1 > 0
