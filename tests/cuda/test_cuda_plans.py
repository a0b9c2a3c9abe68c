"""Plans for GPUs: which kernel a pattern gets, why others do not, and what estimates rest on."""

from __future__ import annotations

import numpy as np
import pytest
from tvm_sparse.schedules.cuda.tensor_cost import needed_columns
from tvm_sparse.schedules.cuda.tensor_tiles import TensorShape
from weights import pattern

from tvm_sparse.formats import FORMATS
from tvm_sparse.formats.tensor_tiles import TensorTiles
from tvm_sparse.ops import WeightSite
from tvm_sparse.planner import Decision, decide
from tvm_sparse.profile import profile_weight
from tvm_sparse.targets import machine_of, resolve_target
from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

SIZE = 4096
TARGETS = ["cuda-sm80", "cuda-sm90"]


def site_of(workload: Workload) -> WeightSite:
    assert workload.geometry is not None
    return WeightSite("layer", "w", "lv", workload, workload.geometry.weight_shape)


def decision_for(
    name: str, target: str, dtype: str = "float16", geometry: MatmulGeometry | None = None
) -> Decision:
    """Plan a layer whose weight has a pattern."""
    geometry = geometry or MatmulGeometry(SIZE, SIZE, SIZE)
    workload = Workload("matmul", geometry, dtype)
    profile = profile_weight(pattern(name, *geometry.weight_shape, dtype))
    return decide(site_of(workload), profile, machine_of(resolve_target(target)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "kernel", "run"),
    [
        ("2:4", "cuda_two_four", 8),
        ("tile-wise", "cuda_tile_wise", 1),
        ("V:N:M", "cuda_two_four", 1),
        ("unstructured", "cuda_two_four", 1),
    ],
)
def test_a_pattern_gets_the_kernel_that_is_made_for_it(name, kernel, run, target):
    decision = decision_for(name, target)
    assert (decision.kernel, decision.config["run"]) == (kernel, run)
    assert decision.source == "model" and "faster" in decision.reason
    assert decision.expected_us == decision.candidates[0].expected_us < decision.dense_us


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["blocks of 32", "blocks of 16"])
def test_blocks_get_tensor_cores_dense_or_sparse(name, target):
    # Tiles as high as a block fetch activations for few rows at a time; taller ones need more
    # columns, and hold them as two of four. Neither is far ahead: L2 binds both.
    decision = decision_for(name, target)
    times = {candidate.kernel: candidate.expected_us for candidate in decision.candidates}
    assert decision.is_sparse and decision.expected_us > 0.75 * times["cuda_tile_wise"]
    assert times["cuda_tile_wise"] < 0.5 * decision.dense_us


@pytest.mark.parametrize("target", TARGETS)
def test_tiles_are_not_lower_than_the_pattern_s(target):
    assert decision_for("V:N:M", target).config["mt"] >= 64
    assert decision_for("tile-wise", target).config["mt"] >= 128


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_without_zeros_stays_dense(target):
    decision = decision_for("dense", target)
    assert (decision.kernel, decision.reason) == ("tvm", "the weight has no zeros")


@pytest.mark.parametrize("target", TARGETS)
def test_unstructured_float32_gets_a_kernel(target):
    assert decision_for("unstructured", target, "float32").is_sparse


def test_bfloat16_gets_what_float16_gets():
    assert decision_for("2:4", "cuda-sm80", "bfloat16").kernel == "cuda_two_four"


def test_few_tokens_get_narrow_tiles_that_keep_the_multiprocessors_busy():
    candidates = decision_for(
        "2:4", "cuda-sm80", geometry=MatmulGeometry(3072, 3072, 16)
    ).candidates
    config = next(c.config for c in candidates if c.kernel == "cuda_two_four")
    assert config["nt"] <= 16 and config["mt"] <= 64


@pytest.mark.parametrize(
    ("workload", "reason"),
    [
        (
            Workload("conv2d", Conv2dGeometry(1, 64, 14, 14, 64, (3, 3), groups=4), "float16"),
            "a convolution of 4 groups has no sparse kernel",
        ),
        (
            Workload("matmul", MatmulGeometry(64, 64, 64, "panels"), "float16"),
            "activations in panels are for processors",
        ),
        (Workload("matmul", MatmulGeometry(64, 64, 64), "float64"), "its kernels are for float"),
    ],
)
def test_what_no_kernel_takes_says_why(workload, reason):
    rows, columns = workload.geometry.weight_shape
    profile = profile_weight(pattern("unstructured", rows, columns, "float32"))
    decision = decide(site_of(workload), profile, machine_of(resolve_target("cuda-sm90")))
    assert decision.kernel == "tvm" and reason in decision.reason


def test_no_tile_is_planned_that_does_not_fit_into_shared_memory_or_registers():
    for target in (*TARGETS, "cuda-sm86", "cuda-sm89"):
        for candidate in decision_for("2:4", target).candidates:
            assert np.isfinite(candidate.expected_us)


def trained_like(rows: int, columns: int, sparsity: float, seed: int = 0) -> np.ndarray:
    """Prune weights whose rows and columns differ in scale."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns))
    weight *= np.exp(0.12 * rng.standard_normal((rows, 1)))
    weight *= np.exp(0.16 * rng.standard_normal((1, columns)))
    kept = np.abs(weight) > np.quantile(np.abs(weight), sparsity)
    return (weight * kept).astype(np.float16)


def trained_like_kernels(rows: int, channels: int, sparsity: float) -> np.ndarray:
    """Prune 3x3 kernels that differ in scale: most become empty."""
    rng = np.random.default_rng(0)
    scales = np.exp(0.55 * rng.standard_normal((rows, channels, 1)))
    weight = rng.standard_normal((rows, channels, 9)) * scales
    kept = np.abs(weight) > np.quantile(np.abs(weight), sparsity)
    return (weight * kept).reshape(rows, -1).astype(np.float16)


def random_matrix(density: float, dtype: str = "float16") -> np.ndarray:
    rng = np.random.default_rng(1)
    return (rng.random((256, 2048)) < density).astype(dtype)


WEIGHTS = {
    **{
        name: lambda name=name: pattern(name, 512, 2048)
        for name in ("2:4", "tile-wise", "blocks of 32", "blocks of 16", "V:N:M", "dense")
    },
    **{
        f"{density:.0%} at random": lambda density=density: random_matrix(density)
        for density in (0.02, 0.05, 0.1, 0.2, 0.5)
    },
    "10% of float32 at random": lambda: random_matrix(0.1, "float32"),
    "trained, 80 %": lambda: trained_like(256, 2048, 0.8),
    "trained, 90 %": lambda: trained_like(256, 2048, 0.9),
    "trained, 95 %": lambda: trained_like(256, 2048, 0.95),
    "3x3 kernels, 80 %": lambda: trained_like_kernels(256, 128, 0.8),
    "3x3 kernels, 90 %": lambda: trained_like_kernels(256, 128, 0.9),
}


@pytest.mark.parametrize("name", list(WEIGHTS))
@pytest.mark.parametrize("weight_format", ["tile_wise", "two_four", "tile_wise_two_four"])
def test_the_columns_that_are_counted_on_are_those_that_packing_lists(weight_format, name):
    weight = WEIGHTS[name]()
    profile = profile_weight(weight)
    parts = FORMATS[weight_format].parts
    assert isinstance(FORMATS[weight_format], TensorTiles)
    for mt, run in ((16, 1), (32, 8), (64, 1), (128, 1), (128, 8)):
        shape = TensorShape(
            len(weight), mt, 32, run, parts, 128, 1, 4, 1, 3, str(weight.dtype), True
        )
        expected, _ = needed_columns(profile, shape)
        packed = FORMATS[weight_format].pack(weight, {"mt": mt, "kb": 32, "run": run})
        listed = sum(32 * int(packed.arrays[f"{part}_begins"][-1]) for part in parts)
        # A sample of large blocks is one of few.
        near = 0.2 if name == "blocks of 32" else 0.15
        assert sum(expected.values()) == pytest.approx(listed, rel=near), (mt, run)
