"""Kernels with a weight agree with float64, whatever the shape, the pattern and the tile."""

import numpy as np
import pytest
from dense_support import machine
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_reference import EPILOGUES, operands, reference, weight_for
from panel_support import build_kernel, check_kernel
from tvm_sparse.schedules.base import matrix_view
from tvm_sparse.schedules.lookup import template_named
from tvm_sparse.schedules.x86.templates import block_step, narrowed

from tvm_sparse.check import compare
from tvm_sparse.panels import Panels
from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

SPARSE = ["register_tile", "sliced_rows", "gathered_panels"]
TEMPLATES = [*SPARSE, "dense_panels"]
# Those that compute any convolution, and any matrix product of a known number of tokens in rows.
ALL = [*TEMPLATES, "channel_vectors", "compact_channels"]
# One below, at and above a vector and a panel, primes, one.
SIZES = [1, 2, 3, 7, 15, 16, 17, 31, 33, 48, 63, 64, 65, 67]
sizes = st.sampled_from(SIZES)


@pytest.mark.parametrize("lanes", [16, 8, 4])
@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=6)
@given(
    m=sizes,
    k=sizes,
    n=sizes,
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    epilogue=st.sampled_from(list(EPILOGUES)),
    symbolic=st.booleans(),
    seed=st.integers(0, 99),
)
def test_matmul_agrees_with_float64(template, lanes, m, k, n, density, epilogue, symbolic, seed):
    geometry = MatmulGeometry(m, k, None if symbolic else n)
    workload = Workload("matmul", geometry, epilogue=EPILOGUES[epilogue])
    weight = weight_for(geometry, density, seed)
    check_kernel(template, workload, weight, lanes, {"kb": 32}, batch=n, seed=seed)


@pytest.mark.parametrize("lanes", [16, 8])
@settings(max_examples=5)
@given(
    m=sizes,
    k=sizes,
    n=st.integers(1, 8),
    epilogue=st.sampled_from(list(EPILOGUES)),
    seed=st.integers(0, 99),
)
def test_a_handful_of_tokens_agrees_with_float64(lanes, m, k, n, epilogue, seed):
    geometry = MatmulGeometry(m, k, n)
    workload = Workload("matmul", geometry, epilogue=EPILOGUES[epilogue])
    check_kernel("gemv", workload, weight_for(geometry, 1.0, seed), lanes, seed=seed)


@pytest.mark.parametrize("lanes", [16, 8])
@settings(max_examples=12)
@given(
    m=sizes,
    k=sizes,
    n=st.integers(1, 8),
    held=st.sampled_from([(1, 4), (2, 4), (4, 4), (1, 8), (3, 8), (4, 8), (8, 8)]),
    epilogue=st.sampled_from(list(EPILOGUES)),
    seed=st.integers(0, 99),
)
def test_n_of_m_weights_agree_with_float64(lanes, m, k, n, held, epilogue, seed):
    geometry = MatmulGeometry(m, k, n)
    workload = Workload("matmul", geometry, epilogue=EPILOGUES[epilogue])
    rng, (most, group) = np.random.default_rng(seed), held
    order = rng.permuted(np.tile(np.arange(group), (m, -(-k // group), 1)), axis=2)
    mask = (order < most).reshape(m, -1)[:, :k]
    weight = weight_for(geometry, 1.0, seed) * mask.T
    check_kernel("n_of_m", workload, weight, lanes, {"m": group}, seed=seed)


@pytest.mark.parametrize("lanes", [16, 8, 4])
@settings(max_examples=6)
@given(
    m=sizes,
    k=sizes,
    n=sizes,
    epilogue=st.sampled_from(list(EPILOGUES)),
    seed=st.integers(0, 99),
)
def test_tokens_one_by_one_agree_with_float64(lanes, m, k, n, epilogue, seed):
    workload = Workload("matmul", MatmulGeometry(m, k, n), epilogue=EPILOGUES[epilogue])
    weight = weight_for(workload.geometry, 1.0, seed)
    check_kernel("channel_vectors", workload, weight, lanes, {"kb": 32}, seed=seed)


def without_channels(weight, op, taps, share, seed):
    """Clear whole rows and input channels, those at the ends among them or not."""
    rng = np.random.default_rng(seed)
    matrix = matrix_view(weight, op).copy()
    matrix[rng.random(len(matrix)) < share] = 0
    channels = matrix.reshape(len(matrix), -1, taps)
    channels[:, rng.random(channels.shape[1]) < share] = 0
    return matrix.T.copy() if op == "matmul" else matrix.reshape(weight.shape)


@pytest.mark.parametrize("lanes", [16, 8, 4])
@settings(max_examples=12)
@given(
    m=sizes,
    k=sizes,
    n=sizes,
    share=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    threads=st.integers(1, 2),
    epilogue=st.sampled_from(list(EPILOGUES)),
    seed=st.integers(0, 99),
)
def test_features_that_are_left_agree_with_float64(lanes, m, k, n, share, threads, epilogue, seed):
    geometry = MatmulGeometry(m, k, n)
    workload = Workload("matmul", geometry, epilogue=EPILOGUES[epilogue])
    weight = without_channels(weight_for(geometry, 1.0, seed), "matmul", 1, share, seed)
    config = {"kb": 32, "threads": threads}
    check_kernel("compact_channels", workload, weight, lanes, config, seed=seed, threads=threads)


@pytest.mark.parametrize("lanes", [16, 8])
@settings(max_examples=12)
@given(
    geometry=st.deferred(lambda: convolutions()),
    share=st.sampled_from([0.3, 0.7, 1.0]),
    threads=st.integers(1, 2),
    epilogue=st.sampled_from(list(EPILOGUES)),
    seed=st.integers(0, 99),
)
def test_channels_that_are_left_agree_with_float64(lanes, geometry, share, threads, epilogue, seed):
    workload = Workload("conv2d", geometry, epilogue=EPILOGUES[epilogue])
    taps = geometry.kernel[0] * geometry.kernel[1]
    weight = without_channels(weight_for(geometry, 1.0, seed), "conv2d", taps, share, seed)
    config = {"kb": 2 * taps, "threads": threads}
    check_kernel("compact_channels", workload, weight, lanes, config, seed=seed, threads=threads)


@pytest.mark.parametrize("size", [1, 2, 4, 5, 8, 10, 13, 14])
def test_images_are_cut_into_rectangles_that_cover_each_pixel_once(size):
    geometry = Conv2dGeometry(1, 24, size, size, 40, (3, 3), padding=(1, 1, 1, 1))
    workload = Workload("conv2d", geometry, epilogue=EPILOGUES["bias+residual+relu"])
    template = template_named("channel_vectors")
    for config in template.space(workload, machine(16)):
        # Several blocks: what two rectangles shared would be summed up twice.
        config = {**config, "kb": 72}
        check_kernel(template.name, workload, weight_for(geometry, 1.0, 0), 16, config)


@st.composite
def convolutions(draw, grouped=False):
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    reach = [(size - 1) * step + 1 for size, step in zip(kernel, dilation, strict=True)]
    groups = draw(st.integers(2, 3)) if grouped else 1
    channels = st.integers(1, 5) if grouped else st.integers(1, 9)
    return Conv2dGeometry(
        batch=draw(st.integers(1, 2)),
        in_channels=draw(channels) * groups,
        in_height=reach[0] + draw(st.integers(0, 9)),
        in_width=reach[1] + draw(st.sampled_from([0, 1, 5, 14, 17, 33])),
        out_channels=draw(channels) * groups,
        kernel=kernel,
        strides=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=tuple(draw(st.integers(0, 2)) for _ in range(4)),
        dilation=dilation,
        groups=groups,
    )


@pytest.mark.parametrize("lanes", [16, 8])
@pytest.mark.parametrize("template", ALL)
@settings(max_examples=8)
@given(
    geometry=convolutions(),
    density=st.sampled_from([0.1, 0.4, 1.0]),
    epilogue=st.sampled_from(list(EPILOGUES)),
    seed=st.integers(0, 99),
)
def test_convolution_agrees_with_float64(template, lanes, geometry, density, epilogue, seed):
    workload = Workload("conv2d", geometry, epilogue=EPILOGUES[epilogue])
    weight = weight_for(geometry, density, seed)
    blocks = {"kb": block_step(workload, lanes) * 2}
    check_kernel(template, workload, weight, lanes, blocks, seed=seed)


@pytest.mark.parametrize("template", ["dense_panels", "channel_vectors"])
@settings(max_examples=8)
@given(geometry=convolutions(grouped=True), epilogue=st.sampled_from(list(EPILOGUES)))
def test_grouped_convolution_agrees_with_float64(template, geometry, epilogue):
    workload = Workload("conv2d", geometry, epilogue=EPILOGUES[epilogue])
    check_kernel(template, workload, weight_for(geometry, 1.0, 0), 8)


@pytest.mark.parametrize("template", ALL)
@pytest.mark.parametrize("pixels", [(7, 7), (14, 14), (16, 16)])
def test_pointwise_convolution_reads_the_image_in_place(template, pixels):
    geometry = Conv2dGeometry(2, 40, *pixels, 23, (1, 1))
    workload = Workload("conv2d", geometry, epilogue=EPILOGUES["bias+residual+relu"])
    check_kernel(template, workload, weight_for(geometry, 0.3, 0), 16)


@pytest.mark.parametrize("lanes", [16, 8])
@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=6)
@given(
    m=sizes,
    k=sizes,
    n=sizes,
    density=st.sampled_from([0.0, 0.1, 1.0]),
    epilogue=st.sampled_from(list(EPILOGUES)),
    seed=st.integers(0, 99),
)
def test_activations_in_panels_agree_with_float64(
    template, lanes, m, k, n, density, epilogue, seed
):
    geometry = MatmulGeometry(m, k, n, "panels")
    workload = Workload("matmul", geometry, epilogue=EPILOGUES[epilogue])
    weight = weight_for(workload.geometry, density, seed)
    cpu = machine(lanes)
    for config in template_named(template).space(workload, cpu)[::3]:
        kernel = build_kernel(template_named(template), workload, weight, lanes, config)
        x, channels, tensors, _ = operands(workload, n, seed)
        vectors = narrowed(workload, cpu).lanes if template == "sliced_rows" else lanes
        panels = Panels(n, config["nt"], vectors)
        packed = [panels.pack(tensor) for tensor in tensors]
        got = kernel.run(panels.pack(x), channels, packed, (panels.size(m),))
        want, bound = reference(workload, weight, x, channels, tensors)
        assert compare(f"{template} {config}", panels.unpack(got, m), want, bound).ok
        for first, width in panels.bounds():
            behind = first * (m + 1) + m * width
            assert not got[behind : behind + width].any(), "zeros behind the last feature"


@pytest.mark.parametrize("op", ["matmul", "conv2d"])
@pytest.mark.parametrize("template", ALL)
def test_every_configuration_of_the_space_agrees_with_float64(template, op):
    geometry = (
        MatmulGeometry(50, 130, 70)
        if op == "matmul"
        else Conv2dGeometry(1, 20, 9, 9, 26, (3, 3), padding=(1, 1, 1, 1))
    )
    workload = Workload(op, geometry, epilogue=EPILOGUES["bias"])
    weight = weight_for(geometry, 0.2, 0)
    for config in template_named(template).space(workload, machine(8)):
        check_kernel(template, workload, weight, 8, config)


@pytest.mark.parametrize("n", [64, 300])
@pytest.mark.parametrize("template", ALL)
def test_threads_share_a_layer(template, n):
    geometry = MatmulGeometry(200, 96, n)
    workload = Workload("matmul", geometry, epilogue=EPILOGUES["bias+residual+relu"])
    config = {"threads": 2, "parts": 2, "kb": 48}
    if template in SPARSE:
        config["multiple"] = 48
    check_kernel(template, workload, weight_for(geometry, 0.2, 0), 16, config, threads=2)


@pytest.mark.parametrize("template", ALL)
def test_threads_share_a_convolution(template):
    geometry = Conv2dGeometry(2, 12, 20, 20, 40, (3, 3), padding=(1, 1, 1, 1))
    workload = Workload("conv2d", geometry, epilogue=EPILOGUES["bias"])
    config = {"threads": 2, "parts": 2}
    if template in SPARSE:
        config["multiple"] = 48
    check_kernel(template, workload, weight_for(geometry, 0.2, 0), 16, config, threads=2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("template", ALL)
def test_nan_and_inf_in_the_weight_reach_the_result(template, value):
    geometry = MatmulGeometry(20, 30, 17)
    weight = weight_for(geometry, 0.3, 0)
    weight[4, 9] = value
    check_kernel(template, Workload("matmul", geometry), weight, 16)


def test_depthwise_convolution_agrees_with_float64():
    geometry = Conv2dGeometry(1, 24, 15, 17, 24, (3, 3), (2, 2), (1, 1, 1, 1), groups=24)
    workload = Workload("conv2d", geometry, epilogue=EPILOGUES["bias+residual+relu"])
    check_kernel("depthwise", workload, weight_for(geometry, 1.0, 0), 16)


@pytest.mark.parametrize(
    ("template", "workload", "words"),
    [
        (
            "register_tile",
            Workload("conv2d", Conv2dGeometry(1, 8, 9, 9, 8, (3, 3), groups=8)),
            "depthwise",
        ),
        (
            "register_tile",
            Workload("conv2d", Conv2dGeometry(1, 8, 9, 9, 8, (3, 3), groups=2)),
            "2 groups",
        ),
        ("gemv", Workload("matmul", MatmulGeometry(8, 8, 9)), "1 to 8 tokens"),
        ("gemv", Workload("matmul", MatmulGeometry(8, 8, 2, "panels")), "in panels"),
        ("sliced_rows", Workload("matmul", MatmulGeometry(8, 8, None, "panels")), "known number"),
        (
            "channel_vectors",
            Workload("matmul", MatmulGeometry(8, 8, None)),
            "known number",
        ),
        ("channel_vectors", Workload("matmul", MatmulGeometry(8, 8, 9, "panels")), "in panels"),
        (
            "channel_vectors",
            Workload("conv2d", Conv2dGeometry(1, 8, 80, 80, 8, (3, 3))),
            "4096 pixels",
        ),
        ("depthwise", Workload("matmul", MatmulGeometry(8, 8, 9)), "only for depthwise"),
    ],
)
def test_what_a_template_cannot_do_it_refuses_in_words(template, workload, words):
    match = template_named(template).supports(workload, machine(8))
    assert not match
    assert words in match.reason


@pytest.mark.parametrize("n", [1, 4, 8])
def test_few_tokens_and_rows_of_several_blocks_agree_with_float64(n):
    geometry = MatmulGeometry(33, 13000, n)
    workload = Workload("matmul", geometry, epilogue=EPILOGUES["bias"])
    check_kernel("sliced_rows", workload, weight_for(geometry, 0.05, 0), 16)
