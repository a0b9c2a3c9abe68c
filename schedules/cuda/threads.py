"""Threads of a block in TensorIR's builder: their numbers, shared work, barriers, local memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script import builder as B

WARP = 32

_BYTES = {"uint8": 1, "uint16": 2, "float16": 2, "bfloat16": 2, "int32": 4, "uint32": 4}
_BYTES |= {"float32": 4, "uint64": 8}

_AT_ONCE = "tirx.launch_bounds_min_blocks_per_sm"


@dataclass(frozen=True)
class Threads:
    """The threads of a block, as `warps` warps of 32 lanes.

    Attributes
    ----------
    warps : int
    lane, warp : PrimExpr
        Numbers of the thread inside its warp, and of the warp.
    """

    warps: int
    lane: Any
    warp: Any

    @property
    def count(self) -> int:
        """Threads of the block."""
        return self.warps * WARP

    @property
    def number(self) -> Any:
        """Number of the thread inside the block."""
        return self.warp * WARP + self.lane

    @contextmanager
    def share(self, total: Any) -> Iterator[Any]:
        """Loop over `total` pieces of work, neighbouring ones on neighbouring threads."""
        whole = isinstance(total, int) and total % self.count == 0
        turns = T.ceildiv(total, self.count) if not isinstance(total, int) else None
        extent = -(-total // self.count) if turns is None else turns
        with B.serial(0, extent) as turn:
            piece = turn * self.count + self.number
            if whole:
                yield piece
            else:
                with B.If(piece < total), B.Then():
                    yield piece


@contextmanager
def launch(grid: dict[str, Any], warps: int, at_once: int) -> Iterator[tuple[list[Any], Threads]]:
    """Bind loops to the blocks of a grid and to the threads of a block.

    Parameters
    ----------
    grid : mapping of str to int or PrimExpr
        Axis ("x", "y", "z") to blocks.
    warps : int
        Warps a block.
    at_once : int
        Blocks that a multiprocessor shall hold: the compiler keeps to the registers that this
        leaves, and uses all of them.

    Yields
    ------
    list of PrimExpr
        Block numbers, in the order of `grid`.
    Threads
    """
    loops = [B.thread_binding(0, extent, f"blockIdx.{axis}") for axis, extent in grid.items()]
    loops += [B.thread_binding(0, warps, "threadIdx.y"), B.thread_binding(0, WARP, "threadIdx.x")]
    with ExitStack() as stack:
        opened = [stack.enter_context(loop) for loop in loops]
        stack.enter_context(B.attr(T.int32(0), _AT_ONCE, at_once))
        yield opened[:-2], Threads(warps, opened[-1], opened[-2])


def barrier() -> None:
    """Wait for all threads of the block, and for what they wrote to shared memory."""
    B.evaluate(T.tvm_storage_sync("shared"))


def local(length: int, dtype: str = "float32") -> Any:
    """Reserve registers of a thread; every index into them must be known when compiling."""
    return B.alloc_buffer((length,), dtype, scope="local")


def shared(length: int, dtype: str = "float32") -> Any:
    """Reserve shared memory of a block."""
    # TVM 0.27 fails to place an array of one element.
    return B.alloc_buffer((max(length, 2),), dtype, scope="shared.dyn")


def kept(value: Any) -> Any:
    """Compute an int32 once, and return a cheap read of it."""
    register = local(1, "int32")
    B.buffer_store(register, value, [0])
    return register[0]


def whole(buffer: Any) -> Any:
    """Keep all of a local or shared array whose address is given to device functions.

    TVM shrinks arrays to the elements that it sees used, and sees one behind an address.
    """
    for index in (0, int(buffer.shape[0]) - 1):
        # Dropped later than arrays are shrunk.
        B.evaluate(buffer[index])
    return buffer


def shared_bytes(size: int) -> Any:
    """Reserve shared memory of a block, to be cut up by `part_of`.

    TVM places several arrays by their uses, and sees none behind an address: arrays that device
    functions write would lie on top of each other. It has nothing to place where there is one.
    """
    return whole(shared(size, "uint8"))


def part_of(memory: Any, begin: int, length: int, dtype: str) -> Any:
    """Use some of what `shared_bytes` reserved as an array; `begin` is in bytes."""
    size = _BYTES[dtype]
    assert begin % size == 0 and begin + length * size <= int(memory.shape[0])
    return B.decl_buffer(
        (length,), dtype, data=memory.data, elem_offset=begin // size, scope="shared.dyn"
    )
