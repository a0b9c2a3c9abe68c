"""What the tuner may try: every configuration is accepted, can be packed, builds and is right."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from dense_support import features, machine
from layer_reference import EPILOGUES, operands, reference, weight_for
from panel_support import build_kernel
from tvm_sparse.schedules.base import KernelTemplate
from tvm_sparse.schedules.lookup import template_named
from tvm_sparse.schedules.x86.spaces import tuning_space
from tvm_sparse.schedules.x86.templates import TEMPLATES, block_step

from tvm_sparse.check import compare
from tvm_sparse.formats import FORMATS
from tvm_sparse.planner import check_config
from tvm_sparse.targets import X86Machine, machine_of, resolve_target
from tvm_sparse.workload import Conv2dGeometry, Geometry, MatmulGeometry, Workload

AROUND = (1, 1, 1, 1)
SHAPES: dict[str, Geometry] = {
    "tiny": MatmulGeometry(5, 7, 3),
    "one feature": MatmulGeometry(1, 1, 1),
    "bert": MatmulGeometry(768, 768, 128),
    "one token": MatmulGeometry(1024, 784, 1),
    "any tokens": MatmulGeometry(512, 500, None),
    "long rows": MatmulGeometry(40, 25088, 16),
    "longer rows than uint16 counts": MatmulGeometry(12, 70016, 5),
    "panels": MatmulGeometry(64, 100, 40, "panels"),
    "3x3 stride 2": Conv2dGeometry(1, 64, 28, 28, 128, (3, 3), (2, 2), AROUND),
    "7x7 of an image": Conv2dGeometry(1, 3, 56, 56, 64, (7, 7), (2, 2), (3, 3, 3, 3)),
    "1x1": Conv2dGeometry(1, 256, 14, 14, 256, (1, 1)),
    "any batch": Conv2dGeometry(None, 16, 9, 9, 20, (3, 3)),
    "depthwise": Conv2dGeometry(1, 32, 14, 14, 32, (3, 3), padding=AROUND, groups=32),
    "grouped": Conv2dGeometry(1, 32, 14, 14, 48, (3, 3), groups=4),
}
TARGETS = ("x86-64-v2", "x86-64-v3", "x86-64-v4")
WIDER = ("register_tile", "sliced_rows", "gathered_panels", "dense_panels")


def workload_of(geometry: Geometry, threads: int = 1, epilogue: str = "none") -> Workload:
    op = "conv2d" if isinstance(geometry, Conv2dGeometry) else "matmul"
    return Workload(op, geometry, epilogue=EPILOGUES[epilogue], threads=threads)


def spaces_of(
    shape: str, target: str, threads: int
) -> Iterator[tuple[KernelTemplate, Workload, X86Machine, list[dict[str, Any]]]]:
    """Give the space of every template that takes a layer, on a target."""
    cpu = machine_of(resolve_target(target), threads)
    workload = workload_of(SHAPES[shape], threads)
    for template in TEMPLATES:
        if template.supports(workload, cpu):
            yield template, workload, cpu, [dict(c) for c in tuning_space(template, workload, cpu)]


everywhere = pytest.mark.parametrize(
    ("shape", "target", "threads"),
    list(itertools.product(SHAPES, TARGETS, (1, 2))),
    ids=lambda value: str(value),
)


@everywhere
def test_every_configuration_is_accepted_and_can_be_packed(
    shape: str, target: str, threads: int
) -> None:
    for template, workload, cpu, space in spaces_of(shape, target, threads):
        # No format looks at values to say what it can pack.
        weight = np.broadcast_to(np.float32(1), SHAPES[shape].weight_shape)
        for config in space:
            if "zeros_behind" not in config:
                check_config("layer", template, workload, cpu, config)
            match = FORMATS[template.format].supports(weight, config)
            assert match, (template.name, config, match.reason)


@everywhere
def test_no_configuration_comes_twice_and_the_usual_ones_come_first(
    shape: str, target: str, threads: int
) -> None:
    for template, workload, cpu, space in spaces_of(shape, target, threads):
        keys = [tuple(sorted(config.items())) for config in space]
        assert len(set(keys)) == len(keys), template.name
        usual = [tuple(sorted(config.items())) for config in template.space(workload, cpu)]
        usual = list(dict.fromkeys(usual))
        assert keys[: len(usual)] == usual, template.name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", WIDER)
@pytest.mark.parametrize("shape", ["bert", "any tokens", "3x3 stride 2", "1x1"])
def test_there_is_far_more_to_try_than_the_plan_compares(
    shape: str, kernel: str, target: str
) -> None:
    for template, workload, cpu, space in spaces_of(shape, target, 1):
        if template.name == kernel:
            assert len(space) >= 3 * len(template.space(workload, cpu))
            for name in ("mr", "nt"):
                assert len({config[name] for config in space}) > 1, name


@pytest.mark.parametrize("kernel", WIDER)
@pytest.mark.parametrize("shape", ["bert", "any tokens", "1x1", "3x3 stride 2"])
def test_a_whole_row_of_columns_in_one_block_is_tried(shape: str, kernel: str) -> None:
    columns = SHAPES[shape].weight_shape[1]
    for template, _, _, space in spaces_of(shape, "x86-64-v4", 1):
        if template.name == kernel:
            assert max(config["kb"] for config in space) >= columns


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("kernel", WIDER)
def test_one_thread_is_tried_beside_all_of_them_with_rows_in_one_piece_or_many(
    kernel: str, threads: int
) -> None:
    template, cpu = template_named(kernel), machine_of(resolve_target("x86-64-v3"), threads)
    space = tuning_space(template, workload_of(SHAPES["bert"], threads), cpu)
    ways = {(config["threads"], config["parts"]) for config in space}
    assert ways == {(1, 1), (threads, 1), (threads, threads)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", WIDER)
def test_what_is_tried_fits_the_registers(kernel: str, target: str) -> None:
    for template, workload, cpu, space in spaces_of("bert", target, 1):
        if template.name == kernel:
            for config in space[len(template.space(workload, cpu)) :]:
                assert config["mr"] * config["nt"] + config["nt"] < cpu.registers


# What builds is right.

SMALL: dict[str, tuple[Geometry, ...]] = {
    "register_tile": (
        MatmulGeometry(29, 45, 33),
        MatmulGeometry(13, 40, None),
        MatmulGeometry(5, 7, 3),
        Conv2dGeometry(1, 6, 9, 11, 17, (3, 3), (2, 2), AROUND),
        Conv2dGeometry(2, 20, 5, 5, 12, (1, 1)),
    ),
    "dense_panels": (
        MatmulGeometry(29, 45, 33),
        MatmulGeometry(17, 20, 1),
        MatmulGeometry(13, 40, None),
        Conv2dGeometry(1, 6, 9, 11, 18, (3, 3), padding=AROUND, groups=2),
        Conv2dGeometry(1, 6, 8, 8, 6, (3, 3), groups=6),
    ),
    "channel_vectors": (
        MatmulGeometry(29, 45, 17),
        MatmulGeometry(40, 30, 1),
        Conv2dGeometry(1, 6, 9, 13, 17, (3, 3), (2, 2), AROUND),
        Conv2dGeometry(2, 20, 5, 5, 40, (1, 1)),
        Conv2dGeometry(1, 6, 7, 7, 18, (3, 3), padding=AROUND, groups=2),
    ),
    "gemv": (MatmulGeometry(21, 30, 1), MatmulGeometry(40, 16, 3)),
    "depthwise": (
        Conv2dGeometry(1, 5, 9, 12, 5, (3, 3), (2, 2), AROUND, groups=5),
        Conv2dGeometry(2, 4, 7, 7, 4, (5, 5), groups=4),
    ),
}
SMALL["n_of_m"] = SMALL["gemv"]
SMALL["compact_channels"] = tuple(
    shape for shape in SMALL["channel_vectors"] if getattr(shape, "groups", 1) == 1
)
SMALL["sliced_rows"] = SMALL["gathered_panels"] = SMALL["register_tile"]
# Kernels to build of each template: all these together take seconds.
_BUILT = {
    "register_tile": 8,
    "sliced_rows": 7,
    "gathered_panels": 6,
    "dense_panels": 6,
    "channel_vectors": 6,
    "compact_channels": 4,
    "gemv": 2,
    "n_of_m": 3,
    "depthwise": 2,
}
# So small a cache cuts even these shapes into several blocks.
_TINY_L1 = 4 << 10


def check_drawn(kernel: str, count: int) -> None:
    """Build and run configurations drawn at random, each shape in turn."""
    draw, template = random.Random(kernel), template_named(kernel)
    needed = {16: "avx512f", 8: "avx2", 4: "sse4.1"}
    widths = [lanes for lanes, feature in needed.items() if feature in features()]
    shapes, epilogues = itertools.cycle(SMALL[kernel]), itertools.cycle(EPILOGUES)
    for number in range(count):
        threads = draw.choice((1, 2))
        workload = workload_of(next(shapes), threads, next(epilogues))
        lanes = draw.choice([w for w in widths if template.supports(workload, machine(w))])
        cpu = replace(machine(lanes, threads), l1_bytes=draw.choice((_TINY_L1, 48 << 10)))
        assert template.supports(workload, cpu)
        space = tuning_space(template, workload, cpu)
        check_config("layer", template, workload, cpu, config := dict(draw.choice(space)))
        check_result(template, workload, lanes, config, (0.3, 0.05, 1.0)[number % 3], number)


def check_result(
    template: KernelTemplate,
    workload: Workload,
    lanes: int,
    config: dict[str, Any],
    density: float,
    seed: int,
) -> None:
    """Compare one configuration with float64."""
    geometry = workload.geometry
    assert geometry is not None
    batch = geometry.n if isinstance(geometry, MatmulGeometry) else geometry.batch
    weight = weight_for(geometry, density, seed)
    x, channels, tensors, shape = operands(workload, batch or 19, seed)
    kernel = build_kernel(template, workload, weight, lanes, config)
    got = kernel.run(x, channels, tensors, shape)
    want, bound = reference(workload, weight, x, channels, tensors)
    name = f"{template.name} {config} of {workload} on {lanes} lanes"
    check = compare(name, got, want, bound)
    assert check.ok, check


@pytest.mark.parametrize("kernel", SMALL)
def test_configurations_drawn_at_random_agree_with_float64(kernel: str) -> None:
    check_drawn(kernel, _BUILT[kernel])


def test_every_template_that_has_a_space_has_shapes_here() -> None:
    for shape, target in itertools.product(SHAPES, TARGETS):
        for template, _, _, space in spaces_of(shape, target, 1):
            assert not space or template.name in SMALL


@pytest.mark.parametrize("taps", [1, 4, 9])
def test_blocks_of_a_convolution_are_whole_channels(taps: int) -> None:
    kernel = (taps, 1) if taps < 9 else (3, 3)
    geometry = Conv2dGeometry(1, 37, 16, 16, 24, kernel)
    workload, cpu = workload_of(geometry), machine_of(resolve_target("x86-64-v4"), 1)
    for name in WIDER:
        for config in tuning_space(template_named(name), workload, cpu):
            assert config["kb"] % block_step(workload, cpu.lanes) == 0
