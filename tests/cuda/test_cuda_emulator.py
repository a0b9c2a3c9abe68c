"""The emulator of CUDA source: the device functions that TVM's source calls, against NumPy.

The kernels are tiny, and made as the real ones are. Where nvcc is found it compiles them too, so
that their instructions are known to assemble.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulator import KernelFault, SharedTraffic, cuda_source, emulate, needs_compiler
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as B
from tvm_sparse.schedules.cuda import ptx
from tvm_sparse.schedules.cuda.threads import (
    Threads,
    barrier,
    launch,
    local,
    part_of,
    shared_bytes,
    whole,
)

pytestmark = needs_compiler

NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SHORT = pytest.mark.parametrize("dtype", list(NUMPY))


def built(body: Callable[..., None], warps: int = 1, **shapes: tuple[tuple[int, ...], str]) -> Any:
    """Build a kernel of one block; `body` gets the threads, and a buffer by each name."""
    with IRBuilder() as builder:
        with B.prim_func():
            B.func_name("tiny")
            B.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            buffers = {
                name: B.arg(name, B.Buffer(shape, dtype)) for name, (shape, dtype) in shapes.items()
            }
            with launch({"x": 1}, warps, 1) as (_, threads):
                body(threads, **buffers)
    return builder.get()


def run(function: Any, warps: int = 1, **options: Any) -> SharedTraffic:
    """Emulate a kernel of one block; options in capitals are its arguments, in small letters."""
    arguments = {name.lower(): options.pop(name) for name in list(options) if name.isupper()}
    return emulate(cuda_source(function), arguments, [1], [32, warps], **options)


def random(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(NUMPY[dtype])


def fill_shared(buffer: Any, source: Any, threads: Threads) -> None:
    """Bring an array to shared memory as a kernel does, 16 bytes at a time."""
    with threads.share(int(source.shape[0]) // 8) as i:
        ptx.copy_async(buffer[i * 8], source[i * 8], 16)


def arrived() -> None:
    ptx.commit_copies()
    ptx.wait_for_copies(0)
    barrier()


def clear(sums: Any) -> None:
    for i in range(4):
        B.buffer_store(sums, T.float32(0), [i])


def store_sums(y: Any, sums: Any, lane: Any) -> None:
    """Write the 16x8 sums of a warp."""
    for i in range(4):
        row, column = lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2
        B.buffer_store(y, sums[i], [row * 8 + column])


def dense(dtype: str) -> Any:
    """Build A (16x16) times B (16x8), B by its rows."""

    def body(threads: Threads, a: Any, b: Any, y: Any) -> None:
        lane, memory = threads.lane, shared_bytes(768)
        a_tile, b_tile = part_of(memory, 0, 256, dtype), part_of(memory, 512, 128, dtype)
        fill_shared(a_tile, a, threads)
        fill_shared(b_tile, b, threads)
        arrived()
        a_held, b_held = whole(local(4, "uint32")), whole(local(2, "uint32"))
        sums = local(4)
        clear(sums)
        ptx.load_matrices(a_held[0], a_tile[lane % 16 * 16 + lane // 16 * 8], 4, False)
        ptx.load_matrices(b_held[0], b_tile[lane % 16 * 8], 2, True)
        ptx.multiply(sums[0], a_held[0], b_held[0], dtype)
        store_sums(y, sums, lane)

    return built(body, a=((256,), dtype), b=((128,), dtype), y=((128,), "float32"))


def two_of_four(dtype: str, selector: int) -> Any:
    """Build A (16x32, two of four) times B (32x8), B by its columns."""

    def body(threads: Threads, a: Any, b: Any, chosen: Any, y: Any) -> None:
        lane, memory = threads.lane, shared_bytes(1024)
        a_tile, b_tile = part_of(memory, 0, 256, dtype), part_of(memory, 512, 256, dtype)
        fill_shared(a_tile, a, threads)
        fill_shared(b_tile, b, threads)
        arrived()
        a_held, b_held = whole(local(4, "uint32")), whole(local(4, "uint32"))
        sums = local(4)
        clear(sums)
        ptx.load_matrices(a_held[0], a_tile[lane % 16 * 16 + lane // 16 * 8], 4, False)
        ptx.load_matrices(b_held[0], b_tile[lane % 8 * 32 + lane // 8 * 8], 4, False)
        ptx.multiply_two_of_four(sums[0], a_held[0], b_held[0], chosen[lane], selector, dtype)
        store_sums(y, sums, lane)

    shapes = {"a": ((256,), dtype), "b": ((256,), dtype), "chosen": ((32,), "uint32")}
    return built(body, **shapes, y=((128,), "float32"))


@SHORT
def test_ldmatrix_and_mma_multiply(dtype):
    a, b, y = random((16, 16), dtype), random((16, 8), dtype, 1), np.zeros((16, 8), np.float32)
    run(dense(dtype), A=a, B=b, Y=y)
    np.testing.assert_allclose(y, a.astype(float) @ b.astype(float), rtol=1e-5, atol=1e-5)


def random_pattern(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return columns of 16 x 16 kept elements of rows of 32, and their two-bit indices."""
    rng = np.random.default_rng(seed)
    pairs = np.array([(i, j) for i in range(4) for j in range(i + 1, 4)])
    index = pairs[rng.integers(0, 6, (16, 8))].reshape(16, 16)
    return index + np.repeat(np.arange(8) * 4, 2), index


def metadata(index: np.ndarray, selector: int) -> np.ndarray:
    """Lay indices out for the lanes; those that are not read hold nonsense."""
    chosen = np.full(32, 0xDEADBEEF, np.uint32)
    for g in range(8):
        for half in range(2):
            bits = [
                sum(int(v) << 2 * i for i, v in enumerate(index[row, 8 * half : 8 * half + 8]))
                for row in (g, g + 8)
            ]
            chosen[4 * g + 2 * selector + half] = bits[0] | bits[1] << 16
    return chosen


@SHORT
@pytest.mark.parametrize("selector", [0, 1])
def test_mma_sp_multiplies_what_is_kept_of_four(dtype, selector):
    kept, b = random((16, 16), dtype), random((32, 8), dtype, 1)
    columns, index = random_pattern(selector)
    full = np.zeros((16, 32))
    np.put_along_axis(full, columns, kept.astype(float), axis=1)
    y, chosen = np.zeros((16, 8), np.float32), metadata(index, selector)
    run(two_of_four(dtype, selector), A=kept, B=np.ascontiguousarray(b.T), CHOSEN=chosen, Y=y)
    np.testing.assert_allclose(y, full @ b.astype(float), rtol=1e-5, atol=1e-5)


def test_indices_that_do_not_ascend_are_refused():
    kept, b = random((16, 16), "float16"), random((8, 32), "float16")
    chosen, y = np.full(32, 0x55555555, np.uint32), np.zeros(128, np.float32)
    with pytest.raises(KernelFault, match="take elements 1 and 1"):
        run(two_of_four("float16", 0), A=kept, B=b, CHOSEN=chosen, Y=y)
