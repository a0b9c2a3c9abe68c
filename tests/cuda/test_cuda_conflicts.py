"""Kernels for tensor cores pass over the banks of shared memory no more often than they have to."""

from __future__ import annotations

from typing import Any

import pytest
from emulator import needs_compiler
from kernel_support import MACHINE, run_kernel
from layer_reference import EPILOGUES, weight_for
from tvm_sparse.schedules.lookup import template_named

from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

pytestmark = needs_compiler

# How activations come, and in runs of how many columns.
LAYERS: dict[str, tuple[Any, int]] = {
    "token rows": (MatmulGeometry(128, 64, 128), 8),
    "turned tokens": (MatmulGeometry(128, 64, 128), 1),
    "features": (MatmulGeometry(128, 64, 128, "features"), 1),
    "features one by one": (MatmulGeometry(128, 64, 127, "features"), 1),
    "1x1": (Conv2dGeometry(1, 64, 12, 12, 128, (1, 1)), 1),
    "3x3": (Conv2dGeometry(1, 8, 12, 12, 128, (3, 3), padding=(1, 1, 1, 1)), 1),
}


def check_all_tiles(template_name: str, layer: str, dtype: str, some: slice = slice(None)) -> None:
    """Run a layer at every tile of the space."""
    geometry, run = LAYERS[layer]
    op = "matmul" if isinstance(geometry, MatmulGeometry) else "conv2d"
    workload = Workload(op, geometry, dtype, EPILOGUES["none"])
    weight = weight_for(geometry, 0.5, 0, dtype)
    batch = geometry.n if op == "matmul" else geometry.batch
    space = template_named(template_name).space(workload, MACHINE)
    for config in [config for config in space if config["run"] == run][some]:
        launches = run_kernel(template_name, workload, weight, config, batch, count_conflicts=True)
        for name, traffic in launches.items():
            conflicts = {line: n for line, n in traffic.by_site.items() if n[0] > n[1]}
            assert not conflicts, (config, name)
            assert traffic.ideal


@pytest.mark.parametrize("layer", list(LAYERS))
def test_tiles_here_and_there_have_no_conflicts(layer):
    check_all_tiles("cuda_tile_wise_two_four", layer, "float16", slice(1, None, 7))
    check_all_tiles("cuda_tile_wise_two_four", layer, "float32", slice(9, None, 9))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("layer", list(LAYERS))
def test_no_tile_has_conflicts(layer, dtype):
    check_all_tiles("cuda_tile_wise_two_four", layer, dtype)
