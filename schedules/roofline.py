"""What a layer's kernel does, and the limits of the machine that it is held against."""

from __future__ import annotations

from dataclasses import dataclass

from ..dtypes import numpy_dtype
from ..profile import SparsityProfile
from ..report import Ceilings
from ..targets import Machine, X86Machine
from ..workload import MatmulGeometry, Workload
from .base import Config, KernelTemplate
from .cuda import cost as cuda_cost
from .lookup import symbolic_sizes
from .x86 import cost as x86_cost

_LINE_BYTES = 64


@dataclass(frozen=True)
class Work:
    """What one call of a kernel has to do.

    Attributes
    ----------
    operations : float
        Multiplications and additions with nonzeros of the weight.
    bytes : float
        The packed weight, the activations that are read and the results that are written, each
        counted once.
    """

    operations: float
    bytes: float


def ceilings(machine: Machine) -> Ceilings:
    """Tell how fast a machine multiplies and reads memory at most, as the cost model has it."""
    if isinstance(machine, X86Machine):
        cycles = machine.gigahertz * machine.threads
        return Ceilings(
            gflops=2 * machine.lanes * machine.fma_per_cycle * cycles,
            memory_gbytes=_LINE_BYTES * cycles / x86_cost.prices_of(machine).memory_line,
        )
    clock = 2 * machine.multiprocessors * machine.gigahertz
    return Ceilings(
        gflops=clock * machine.cores,
        memory_gbytes=machine.memory_gbytes,
        tensor_gflops=clock * machine.tensor_macs * machine.warp_share,
    )


def work(workload: Workload, machine: Machine, nnz: int, weight_bytes: int) -> Work | None:
    """Count what a layer has to do; None of one whose operator is not known."""
    geometry = workload.geometry
    if geometry is None:
        return None
    tokens, images = symbolic_sizes(machine)
    if isinstance(geometry, MatmulGeometry):
        columns = geometry.n or tokens
        moved = columns * (geometry.k + geometry.m)
    else:
        batch = geometry.batch or images
        columns = batch * geometry.pixels
        image = geometry.in_channels * geometry.in_height * geometry.in_width
        moved = batch * image + columns * geometry.out_channels
    width = numpy_dtype(workload.dtype).itemsize
    return Work(2.0 * nnz * columns, float(weight_bytes + width * moved))


def bound_by(
    template: KernelTemplate,
    workload: Workload,
    machine: Machine,
    profile: SparsityProfile,
    config: Config,
) -> str | None:
    """Name what takes a kernel the longest by estimate; None where it has no estimate."""
    events = template.events(workload, machine, profile, config)
    if not events:
        return None
    if isinstance(machine, X86Machine):
        return x86_cost.binds(events, machine)
    # Where no block fits, nothing runs.
    return cuda_cost.binds(events, machine) if events["at_once"] else None
