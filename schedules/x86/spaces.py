"""What the tuner may try of each kernel template: far more than the plan compares by estimate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from ...formats.splitting import MAX_BLOCK
from ...targets import X86Machine
from ...workload import Workload
from ..base import Config, KernelTemplate
from .templates import (
    BLOCK_STEP,
    block_length,
    block_step,
    columns_of,
    narrowed,
    row_multiple,
)

# Shares of L1 that a block of activations may take; a whole row of columns is tried as well.
_BLOCKS_OF_L1 = (0.5, 0.75, 1, 1.5, 2, 3, 4, 6)
# Eight rows have 255 masks, which take ten seconds to compile and were never fastest.
_MASK_ROWS = (2, 3, 4, 5, 6)
_SLICE_ROWS = (2, 4, 6, 8, 12, 16)
_GATHERED_ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
_DENSE_ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16)
_VECTORS = (1, 2, 3, 4, 6)

# Vector registers beside the accumulators and the shared vectors of activations: values and
# addresses.
_SPARE_REGISTERS = 2


def tuning_space(template: KernelTemplate, workload: Workload, machine: X86Machine) -> list[Config]:
    """List the configurations that may be measured; those of `template.space` come first.

    Each builds, and computes the layer: it is of the form that `planner.check_config` accepts.
    """
    usual = list(template.space(workload, machine))
    if not usual or template.name not in _WIDER:
        return usual
    wider = _WIDER[template.name](usual[0], workload, machine)
    return _distinct([*usual, *wider])


def _distinct(configs: Sequence[Config]) -> list[Config]:
    return list({tuple(sorted(config.items())): config for config in configs}.values())


def _masks(usual: Config, workload: Workload, machine: X86Machine) -> list[Config]:
    return _over(_MASK_ROWS, [usual], workload, machine)


def _slices(usual: Config, workload: Workload, machine: X86Machine) -> list[Config]:
    narrow = narrowed(workload, machine)
    shares = (1, 2) if narrow.lanes > 1 else (1,)
    found = _over(_SLICE_ROWS, [{**usual, "share": s} for s in shares], workload, narrow)
    return [config for config in found if int(config["mr"]) % int(config["share"]) == 0]


def _gathered(usual: Config, workload: Workload, machine: X86Machine) -> list[Config]:
    return _over(_GATHERED_ROWS, [usual], workload, machine)


def _panels(usual: Config, workload: Workload, machine: X86Machine) -> list[Config]:
    return _over(_DENSE_ROWS, [usual], workload, machine)


def _over(
    row_counts: Sequence[int],
    bases: Sequence[Config],
    workload: Workload,
    machine: X86Machine,
) -> list[Config]:
    """Combine register tiles that fit the registers, block lengths, and threads."""
    geometry = workload.geometry
    assert geometry is not None
    groups = getattr(geometry, "groups", 1)
    rows, columns = geometry.weight_shape
    vectors = max(1, -(-columns_of(workload) // machine.lanes))
    found: list[Config] = []
    for mr, nt, base in itertools.product(row_counts, _VECTORS, bases):
        if mr > rows // groups or nt > vectors:
            continue
        if mr * nt + nt + _SPARE_REGISTERS > machine.registers:
            continue
        for kb in _lengths(workload, machine, nt, columns):
            config: dict[str, Any] = {**base, "mr": mr, "nt": nt, "kb": kb}
            if "multiple" in config:
                config["multiple"] = row_multiple(config, machine.lanes)
            found += _with_every_thread_count(config, workload)
    return found


def _lengths(workload: Workload, machine: X86Machine, nt: int, columns: int) -> list[int]:
    step = block_step(workload, BLOCK_STEP)
    width = nt * machine.lanes
    floats = [int(share * machine.l1_bytes) // 4 for share in _BLOCKS_OF_L1]
    # Columns of a block are numbered by uint16.
    longest = min(-(-columns // step), MAX_BLOCK // step) * step
    lengths = [min(block_length(columns, width, size, step), longest) for size in floats]
    return sorted({*lengths, longest})


def _with_every_thread_count(config: dict[str, Any], workload: Workload) -> list[Config]:
    """One thread; and all of them, with rows in one piece or one piece a thread."""
    if workload.threads <= 1:
        return [{**config, "threads": 1, "parts": 1}]
    many = {**config, "threads": workload.threads}
    return [
        {**config, "threads": 1, "parts": 1},
        {**many, "parts": 1},
        {**many, "parts": workload.threads},
    ]


_WIDER: dict[str, Callable[[Config, Workload, X86Machine], list[Config]]] = {
    "register_tile": _masks,
    "sliced_rows": _slices,
    "gathered_panels": _gathered,
    "dense_panels": _panels,
}
