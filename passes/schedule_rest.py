"""Schedule what no template took: fused elementwise chains, data movement, odd reductions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.s_tir import SBlock, Schedule

from ..schedules.x86.dense_kernel import PARALLEL_MICROSECONDS
from ..targets import X86Machine
from .vectorize_math import replace_math_calls

# Inlining a value into several places repeats its work until LLVM finds the repetition.
_LARGEST_INLINED = 400
# Nodes that a call stands for once it is a polynomial.
_CALL_SIZE = 20
# Polynomials of polynomials: TVM takes twice as long for each more.
_MOST_NESTED = 2
# What schedule primitives raise when they do not apply.
_REFUSALS = (RuntimeError, ValueError, IndexError)
_NANOSECONDS_PER_ELEMENT = 0.15


@tvm.transform.module_pass(opt_level=0, name="ScheduleRest")
class ScheduleRest:
    """Schedule every TensorIR function that has none; one that resists stays as it is.

    Elementwise producers are inlined, loops over contiguous memory joined, so that LLVM vectorises
    one long inner loop; the outer loops run on threads when there is enough work. Reductions run
    over an inner loop of contiguous results where there is one.

    Parameters
    ----------
    machine : X86Machine
        Gives vector width and threads.
    """

    def __init__(self, machine: X86Machine) -> None:
        self.machine = machine

    def transform_module(
        self, mod: tvm.IRModule, context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Schedule the functions of the module."""
        result = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
        for name, function in mod.functions_items():
            if isinstance(function, tirx.PrimFunc) and _wants_schedule(function):
                result.update_func(name, schedule_function(function, self.machine))
        return result


def _wants_schedule(function: tirx.PrimFunc) -> bool:
    if any(
        str(key).startswith("tvm_sparse.") or str(key) == "tirx.is_scheduled"
        for key in (function.attrs.keys() if function.attrs else ())
    ):
        return False
    blocks: list[Any] = []
    tvm_ffi.structural_walk(function.body, (SBlock, blocks.append))
    return any(block.iter_vars for block in blocks)


def schedule_function(function: tirx.PrimFunc, machine: X86Machine) -> tirx.PrimFunc:
    """Schedule one function as far as its blocks allow.

    Parameters
    ----------
    function : PrimFunc
        A function of S-TIR blocks.
    machine : X86Machine
        Gives vector width and threads.

    Returns
    -------
    PrimFunc
        The scheduled function, with elementary functions as polynomials.
    """
    schedule = _attempt(function, _inline_all)
    for name in _block_names(schedule):
        schedule = _attempt(
            schedule, lambda s, name=name: _schedule_block(s, s.get_sblock(name), machine)
        )
    result = replace_math_calls(schedule)
    return result.with_attr("tirx.is_scheduled", True)


def _attempt(function: tirx.PrimFunc, step: Any) -> tirx.PrimFunc:
    """Apply a step of scheduling, or leave the function as it was when a primitive refuses."""
    schedule = Schedule(tvm.IRModule({"main": function}))
    try:
        step(schedule)
    except _REFUSALS:
        return function
    return schedule.mod["main"]


def _block_names(function: tirx.PrimFunc) -> list[str]:
    names: list[str] = []
    tvm_ffi.structural_walk(
        function.body,
        (SBlock, lambda block: names.append(str(block.name_hint))),
    )
    # A name that occurs twice cannot be asked for; the root has no work of its own.
    return [name for name in names if name != "root" and names.count(name) == 1]


def _inline_all(schedule: Schedule) -> None:
    for name in _block_names(schedule.mod["main"]):
        block = schedule.get_sblock(name)
        if _is_spatial(schedule.get(block)) and not _should_stay(schedule, block):
            try:
                schedule.compute_inline(block)
            except _REFUSALS:
                # An output block, or one whose indices cannot be inverted.
                continue


def _is_spatial(block: Any) -> bool:
    return all(int(var.iter_type) == tirx.IterVar.DataPar for var in block.iter_vars)


def _should_stay(schedule: Schedule, block: Any) -> bool:
    consumers = schedule.get_consumers(block)
    if not consumers:
        return False
    # A reduction reads each value many times, and a condition in it would stop vectorisation.
    if any(not _is_spatial(schedule.get(c)) for c in consumers) and _nodes(
        schedule.get(block).body, tvm.ir.Call
    ):
        return True
    buffer = _nodes(schedule.get(block).body, tirx.BufferStore)[0].buffer
    uses = sum(
        sum(load.source.same_as(buffer) for load in _nodes(schedule.get(c).body, tvm.ir.TensorLoad))
        for c in consumers
    )
    calls = len(_nodes(schedule.get(block).body, tvm.ir.Call))
    if calls >= _MOST_NESTED and any(_nodes(schedule.get(c).body, tvm.ir.Call) for c in consumers):
        return True
    return uses > 1 and uses * _size(schedule.get(block).body) > _LARGEST_INLINED


def _nodes(root: Any, kind: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(root, (kind, found.append))
    return found


def _size(root: Any) -> int:
    loads = len(_nodes(root, tvm.ir.TensorLoad))
    return loads + _CALL_SIZE * len(_nodes(root, tvm.ir.Call))


def _schedule_block(schedule: Schedule, block: Any, machine: X86Machine) -> None:
    if _is_spatial(schedule.get(block)):
        _schedule_spatial(schedule, block, machine)
    else:
        _schedule_reduction(schedule, block, machine)


def _extents(schedule: Schedule, loops: Sequence[Any]) -> list[int | None]:
    extents = [schedule.get(loop).extent for loop in loops]
    return [int(e.value) if isinstance(e, tirx.IntImm) else None for e in extents]


def _schedule_spatial(schedule: Schedule, block: Any, machine: X86Machine) -> None:
    loops = list(schedule.get_loops(block))
    if not loops:
        return
    extents = _extents(schedule, loops)
    joined = max(1, _contiguous_loops(schedule.get(block), extents))
    outer, inner = loops[: len(loops) - joined], loops[len(loops) - joined :]
    parallel = _is_big(schedule.get(block), extents) and machine.threads > 1
    # Threads need loops of their own: give them some of the joined ones if there are no others.
    while parallel and len(inner) > 1 and not _fills(extents[: len(outer)], machine.threads):
        outer, inner = [*outer, inner[0]], inner[1:]
    if len(inner) > 1:
        schedule.fuse(*inner)
    if not parallel:
        return
    if outer:
        schedule.parallel(schedule.fuse(*outer) if len(outer) > 1 else outer[0])
    elif extents[-1] is not None:
        pieces = _divisor(math.prod(e or 1 for e in extents), machine.threads)
        if pieces > 1:
            first, _ = schedule.split(schedule.get_loops(block)[0], [pieces, None])
            schedule.parallel(first)


def _fills(extents: Sequence[int | None], threads: int) -> bool:
    return bool(extents) and (None in extents or math.prod(e or 1 for e in extents) >= threads)


def _divisor(total: int, least: int) -> int:
    """Give the smallest divisor that is at least `least`, or 1 when there is none nearby."""
    return next((d for d in range(least, 8 * least + 1) if total % d == 0), 1)


def _is_big(block: Any, extents: Sequence[int | None]) -> bool:
    if None in extents:
        return True
    elements = math.prod(e or 1 for e in extents)
    work = elements * _NANOSECONDS_PER_ELEMENT * (1 + len(_nodes(block.body, tvm.ir.Call)))
    return work / 1e3 > PARALLEL_MICROSECONDS


def _contiguous_loops(block: Any, extents: Sequence[int | None]) -> int:
    """Count the last loops that walk through every tensor as if they were one.

    Each tensor either is not indexed by any of them, or has exactly them as its last indices.
    """
    variables = [var.var for var in block.iter_vars]
    if len(variables) != len(extents):
        return 1
    loads = _nodes(block.body, tvm.ir.TensorLoad)
    stores = _nodes(block.body, tirx.BufferStore)
    accesses = [(list(load.indices), list(load.source.shape)) for load in loads]
    accesses += [(list(store.indices), list(store.buffer.shape)) for store in stores]
    count = 1
    while count < len(variables) and all(
        _walks_along(indices, shape, variables, extents, count + 1) for indices, shape in accesses
    ):
        count += 1
    return count


def _walks_along(
    indices: list[Any],
    shape: list[Any],
    variables: list[Any],
    extents: Sequence[int | None],
    count: int,
) -> bool:
    last = list(zip(variables, extents, strict=True))[-count:]
    moving = [var for var, extent in last if extent != 1]
    if not any(_uses(index, var) for index in indices for var in moving):
        return True
    if len(indices) < count or any(
        _uses(index, var) for index in indices[:-count] for var in moving
    ):
        return False
    pairs = zip(indices[-count:], shape[-count:], last, strict=True)
    return all(
        _is_same_axis(index, size, var, extent, first=position == 0)
        for position, (index, size, (var, extent)) in enumerate(pairs)
    )


def _is_same_axis(index: Any, size: Any, var: Any, extent: int | None, first: bool) -> bool:
    if extent == 1:
        return isinstance(size, tirx.IntImm) and int(size.value) == 1
    if not index.same_as(var):
        return False
    # The first joined axis may be a part of its tensor's axis: the others must be all of it.
    return first or extent is None or (isinstance(size, tirx.IntImm) and int(size.value) == extent)


def _uses(expr: Any, var: Any) -> bool:
    return any(node.same_as(var) for node in _nodes(expr, tirx.Var))


def _schedule_reduction(schedule: Schedule, block: Any, machine: X86Machine) -> None:
    """Move the loop over neighbouring results inside the reduction, in pieces that stay in L1."""
    loops = list(schedule.get_loops(block))
    info = schedule.get(block)
    if len(loops) != len(info.iter_vars):
        return
    spatial: list[Any] = []
    reduced: list[Any] = []
    for loop, var in zip(loops, info.iter_vars, strict=True):
        is_spatial = int(var.iter_type) == tirx.IterVar.DataPar
        (spatial if is_spatial else reduced).append(loop)
    extents = _extents(schedule, loops)
    parallel = machine.threads > 1 and _is_big(info, extents)
    inner_is_contiguous = spatial and _reads_contiguously(info)
    outer = list(spatial)
    if inner_is_contiguous:
        outer, last = spatial[:-1], spatial[-1]
        extent = _extents(schedule, [last])[0]
        piece = _piece(extent, 4 * machine.lanes)
        if piece is not None and piece != extent:
            head, last = schedule.split(last, [None, piece])
            outer.append(head)
        schedule.reorder(*outer, *reduced, last)
    if outer and parallel:
        fused = schedule.fuse(*outer) if len(outer) > 1 else outer[0]
        schedule.parallel(fused)
    if inner_is_contiguous:
        schedule.decompose_reduction(block, reduced[0])


def _piece(extent: int | None, wish: int) -> int | None:
    """Give the largest divisor of a known extent that is at most `wish`; all of it if too small."""
    if not extent:
        return extent
    best = next(d for d in itertools.count(min(wish, extent), -1) if extent % d == 0)
    return best if best >= wish // 4 else extent


def _reads_contiguously(block: Any) -> bool:
    """Whether the last result axis is the last axis, plain, of what is read and written."""
    spatial = [v.var for v in block.iter_vars if int(v.iter_type) == tirx.IterVar.DataPar]
    last = spatial[-1]
    accesses = [node.indices for node in _nodes(block.body, tvm.ir.TensorLoad)]
    accesses += [node.indices for node in _nodes(block.body, tirx.BufferStore)]
    using = [list(indices) for indices in accesses if any(_uses(i, last) for i in indices)]
    return bool(using) and all(
        indices[-1].same_as(last) and not any(_uses(i, last) for i in indices[:-1])
        for indices in using
    )
