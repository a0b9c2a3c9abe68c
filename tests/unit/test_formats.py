"""Laws that every row of the table of formats obeys."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_sparse.dtypes import numpy_dtype
from tvm_sparse.formats import FORMATS
from tvm_sparse.formats.clustering import cluster_rows, pair_rows
from tvm_sparse.formats.splitting import split_rows

# Format -> configurations that its contract is tested with.
CONFIGS = {
    "dense": [{"mr": 1}, {"mr": 6}, {"mr": 48}],
    "plain": [{}],
    "register_tiled": [
        {"mr": 1, "kb": 16},
        {"mr": 4, "kb": 16},
        {"mr": 4, "kb": 48, "cluster": False},
        {"mr": 4, "kb": 32, "parts": 2, "multiple": 8},
        {"mr": 6, "kb": 4096},
        {"mr": 8, "kb": 1},
    ],
    "sliced_ell": [
        {"mr": 1, "kb": 16},
        {"mr": 2, "kb": 48},
        {"mr": 4, "kb": 32, "parts": 2, "multiple": 8},
        {"mr": 16, "kb": 4096},
        {"mr": 2, "kb": 16, "share": 2},
        {"mr": 4, "kb": 32, "parts": 2, "multiple": 8, "share": 2},
        {"mr": 6, "kb": 24, "share": 2, "zeros_behind": "matrix"},
    ],
    "gathered_panels": [
        {"mr": 1, "kb": 16},
        {"mr": 8, "kb": 48},
        {"mr": 4, "kb": 32, "parts": 2, "multiple": 8},
        {"mr": 16, "kb": 4096},
    ],
    "compact_channels": [{"mr": 1}, {"mr": 16, "taps": 1}, {"mr": 32}],
    "n_of_m": [{"mr": 8, "m": 4}, {"mr": 16, "m": 4}, {"mr": 16, "m": 8}, {"mr": 3, "m": 8}],
    "row_tiles": [
        {"mt": 1, "kb": 16, "step": 1},
        {"mt": 8, "kb": 9, "step": 4},
        {"mt": 64, "kb": 4096, "step": 2},
    ],
    "tile_wise": [{"mt": 16, "kb": 16, "run": 1}, {"mt": 32, "kb": 64, "run": 1}],
    "two_four": [{"mt": 16, "kb": 32, "run": 1}, {"mt": 64, "kb": 64, "run": 1}],
    "tile_wise_two_four": [{"mt": 16, "kb": 32, "run": 1}, {"mt": 32, "kb": 64, "run": 1}],
    "bitmap_tiles": [{"mt": 16, "kb": 16}, {"mt": 32, "kb": 32}, {"mt": 64, "kb": 128}],
}
# What a format's kernels compute with, where that is not float32.
TENSOR_TILES = ("tile_wise", "two_four", "tile_wise_two_four")
DTYPES = dict.fromkeys((*TENSOR_TILES, "bitmap_tiles"), "float16")
CASES = [(name, config) for name, configs in CONFIGS.items() for config in configs]


def special_matrices():
    rng = np.random.default_rng(0)
    full = rng.standard_normal((13, 37)).astype("float32")
    one_row, no_row, no_column = np.zeros_like(full), full.copy(), full.copy()
    one_row[5] = full[5]
    no_row[3] = 0
    no_column[:, 7] = 0
    negative_zero = np.where(full > 0, full, np.float32(-0.0))
    special = np.zeros_like(full)
    special[0, 0], special[4, 36], special[12, 1] = np.nan, np.inf, -np.inf
    return {
        "zero": np.zeros_like(full),
        "full": full,
        "one dense row": one_row,
        "empty row": no_row,
        "empty column": no_column,
        "negative zero": negative_zero,
        "NaN and Inf": special,
        "one element": np.ones((1, 1), "float32"),
    }


def random_matrix(rows, columns, density, seed):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)).astype("float32")
    return w * (rng.random((rows, columns)) < density)


def same_bits(a, b):
    """Equal bit for bit, but for the sign of zeros."""
    zero = a.dtype.type(0)
    return a.dtype == b.dtype and (a + zero).tobytes() == (b + zero).tobytes()


def as_packed(name, weight):
    """Turn a float32 weight into the type that a format holds."""
    return weight.astype(DTYPES.get(name, "float32"))


def test_every_format_has_configurations_to_be_tested_with():
    assert set(CONFIGS) == set(FORMATS)


@pytest.mark.parametrize(("name", "config"), CASES)
@pytest.mark.parametrize("kind", list(special_matrices()))
def test_unpacking_restores_special_matrices(name, config, kind):
    w = as_packed(name, special_matrices()[kind])
    packed = FORMATS[name].pack(w, config)
    assert same_bits(FORMATS[name].unpack(packed), w)


@pytest.mark.parametrize(("name", "config"), CASES)
@settings(max_examples=15)
@given(st.integers(1, 40), st.integers(1, 70), st.floats(0, 1), st.integers(0, 99))
def test_unpacking_restores_random_matrices(name, config, rows, columns, density, seed):
    w = as_packed(name, random_matrix(rows, columns, density, seed))
    packed = FORMATS[name].pack(w, config)
    assert packed.shape == w.shape
    assert same_bits(FORMATS[name].unpack(packed), w)


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_transposed_view_packs_like_its_copy(name):
    w = as_packed(name, random_matrix(24, 33, 0.3, 0))
    config = CONFIGS[name][0]
    view, copy = FORMATS[name].pack(w.T, config), FORMATS[name].pack(w.T.copy(), config)
    for key, array in view.arrays.items():
        assert np.array_equal(array, copy.arrays[key])


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (np.zeros((2, 2), "float64"), "float64"),
        (np.zeros((2, 2, 2), "float32"), "3 dimensions"),
        (np.zeros((0, 2), "float32"), "no elements"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_a_reason(name, weight, words):
    known = as_packed(name, weight) if weight.dtype == "float32" else weight
    match = FORMATS[name].supports(known, CONFIGS[name][0])
    assert not match
    assert words in match.reason


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"mr": 9, "kb": 16}, "9 rows"),
        ({"mr": 4, "kb": 70000}, "70000 columns"),
        ({"mr": 4, "kb": 16, "multiple": 6}, "where panels end"),
    ],
)
def test_a_register_tile_that_cannot_be_encoded_is_refused(config, words):
    match = FORMATS["register_tiled"].supports(np.ones((8, 8), "float32"), config)
    assert not match
    assert words in match.reason


def test_groups_that_do_not_divide_the_rows_are_refused():
    match = FORMATS["dense"].supports(np.ones((8, 8), "float32"), {"mr": 2, "groups": 3})
    assert "3 groups" in match.reason


def test_a_register_tiled_weight_takes_about_six_bytes_a_nonzero():
    w = random_matrix(768, 768, 0.1, 0)
    packed = FORMATS["register_tiled"].pack(w, {"mr": 4, "kb": 192})
    assert packed.nbytes < 6.5 * np.count_nonzero(w)


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(1, 130), st.integers(1, 8), st.integers(0, 99))
def test_clustering_gives_a_permutation(rows, columns, panel, seed):
    order = cluster_rows(random_matrix(rows, columns, 0.2, seed) != 0, panel)
    assert sorted(order) == list(range(rows))


def test_clustering_brings_equal_rows_together():
    rng = np.random.default_rng(0)
    kinds = rng.random((4, 200)) < 0.2
    which = rng.permutation(np.repeat(np.arange(4), 4))
    order = cluster_rows(kinds[which], 4)
    assert all(len(set(which[order[i : i + 4]])) == 1 for i in range(0, 16, 4))


@settings(max_examples=25)
@given(st.integers(1, 90), st.integers(1, 130), st.integers(0, 99))
def test_pairing_gives_a_permutation(pairs, columns, seed):
    order = pair_rows(random_matrix(2 * pairs, columns, 0.2, seed) != 0)
    assert sorted(order) == list(range(2 * pairs))


def test_pairing_brings_equal_rows_together():
    rng = np.random.default_rng(0)
    kinds = rng.random((24, 300)) < 0.2
    which = rng.permutation(np.repeat(np.arange(24), 2))
    order = pair_rows(kinds[which])
    assert all(which[a] == which[b] for a, b in order.reshape(-1, 2))


def test_rows_that_share_are_stored_with_fewer_columns_than_values():
    w = random_matrix(64, 512, 0.2, 0)
    w[1::2] = w[::2]
    packed = FORMATS["sliced_ell"].pack(w, {"mr": 4, "kb": 128, "share": 2})
    assert packed.arrays["columns"].size < 0.6 * packed.arrays["values"].size


@pytest.mark.parametrize("config", [{"mr": 4, "share": 3}, {"mr": 3, "share": 2}])
def test_rows_that_cannot_be_paired_are_refused(config):
    match = FORMATS["sliced_ell"].supports(np.ones((8, 8), "float32"), {"kb": 8, **config})
    assert "cannot share a column" in match.reason


@settings(max_examples=25)
@given(st.integers(1, 100), st.integers(1, 4), st.sampled_from([4, 16]), st.integers(0, 99))
def test_row_ranges_cover_the_rows_and_end_at_multiples(rows, parts, multiple, seed):
    bounds = split_rows(random_matrix(rows, 20, 0.3, seed), parts, multiple)
    assert bounds[0] == 0
    assert bounds[-1] == rows
    assert list(bounds) == sorted(set(bounds))
    assert len(bounds) <= parts + 1
    assert all(bound % multiple == 0 for bound in bounds[:-1])


def test_row_ranges_share_the_nonzeros():
    w = np.ones((128, 64), "float32")
    w[:32, :] = 0
    bounds = split_rows(w, 2, 16)
    assert bounds == (0, 80, 128)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", TENSOR_TILES)
@pytest.mark.parametrize("run", [1, 8])
def test_tensor_tiles_restore_all_types_in_runs(name, dtype, run):
    w = random_matrix(50, 72, 0.4, 1).astype(numpy_dtype(dtype))
    packed = FORMATS[name].pack(w, {"mt": 32, "kb": 32, "run": run})
    assert same_bits(FORMATS[name].unpack(packed), w)


def two_four_weight(rows, columns, seed):
    rng = np.random.default_rng(seed)
    scores = rng.random((rows, columns // 4, 4))
    kept = np.argsort(np.argsort(scores, axis=2), axis=2) < 2
    return kept.reshape(rows, columns).astype("float16")


@pytest.mark.parametrize("run", [1, 8])
def test_a_two_four_weight_needs_each_column_once(run):
    packed = FORMATS["two_four"].pack(two_four_weight(64, 128, 0), {"mt": 64, "kb": 32, "run": run})
    assert packed.arrays["sparse_columns"].tolist() == list(range(0, 128, run))
    assert packed.config["in_order"] == 1


def test_columns_that_a_tile_chose_are_two_of_four_as_they_stand():
    w = np.zeros((64, 512), "float16")
    w[:, np.sort(np.random.default_rng(0).permutation(512)[:128])] = two_four_weight(64, 128, 1)
    packed = FORMATS["two_four"].pack(w, {"mt": 64, "kb": 32, "run": 1})
    assert packed.arrays["sparse_columns"].size == 128


@pytest.mark.parametrize("density", [0.02, 0.1])
def test_columns_are_listed_hardly_more_often_than_they_have_to_be(density):
    w = random_matrix(16, 2048, density, 0).astype("float16")
    needed = np.count_nonzero(w.any(axis=0))
    packed = FORMATS["two_four"].pack(w, {"mt": 16, "kb": 32, "run": 1})
    assert packed.arrays["sparse_columns"].size < 1.1 * needed + 32


def test_tile_wise_rows_are_regrouped_when_whole_rows_are_empty():
    w = np.zeros((128, 96), "float16")
    w[::2, :48] = 1
    w[64::2, :48] = 0
    w[64::2, 48:] = 1
    packed = FORMATS["tile_wise"].pack(w, {"mt": 32, "kb": 16, "run": 1})
    assert np.diff(packed.arrays["dense_begins"]).tolist() == [3, 3, 0, 0]
    assert packed.config["in_order"] == 0
    assert packed.arrays["tiles"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bitmap_tiles_restore_both_types(dtype):
    w = random_matrix(50, 72, 0.4, 1).astype(numpy_dtype(dtype))
    packed = FORMATS["bitmap_tiles"].pack(w, {"mt": 32, "kb": 32})
    assert same_bits(FORMATS["bitmap_tiles"].unpack(packed), w)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_bitmap_tiles_take_two_bytes_a_nonzero_and_five_bits_for_every_four_elements(density):
    w = random_matrix(256, 1024, density, 0).astype("float16")
    packed = FORMATS["bitmap_tiles"].pack(w, {"mt": 64, "kb": 128})
    assert packed.nbytes == pytest.approx(2 * np.count_nonzero(w) + 5 / 32 * w.size, rel=0.01)


def test_bitmap_tiles_leave_empty_chunks_out():
    w = np.zeros((64, 256), "float16")
    w[40, 130] = 1
    packed = FORMATS["bitmap_tiles"].pack(w, {"mt": 32, "kb": 64})
    assert packed.arrays["begins"].tolist() == [0, 0, 1]
    assert packed.arrays["columns"].tolist() == [128]
    assert packed.arrays["tiles"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"mt": 24, "kb": 64}, "24 rows"),
        ({"mt": 32, "kb": 40}, "40 columns"),
        ({"mt": 256, "kb": 512}, "can be numbered"),
    ],
)
def test_bitmap_tiles_that_cannot_be_encoded_are_refused(config, words):
    match = FORMATS["bitmap_tiles"].supports(np.ones((8, 8), "float16"), config)
    assert not match
    assert words in match.reason
