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
from kernel_support import launches_of, run_kernels
from tvm import tirx
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
    shared,
    shared_bytes,
    whole,
)

from tvm_sparse.cuda_toolkit import compile_source, find_nvcc

NVCC = find_nvcc()

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


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_each_lane_two_neighbours(transposed):
    counts = (1, 2, 4)

    def body(threads: Threads, x: Any, y: Any) -> None:
        tile = part_of(shared_bytes(512), 0, 256, "float16")
        fill_shared(tile, x, threads)
        arrived()
        for turn, count in enumerate(counts):
            held = whole(local(count, "uint32"))
            # Behind shared memory where lanes' addresses are not read.
            row = T.if_then_else(threads.lane < 8 * count, threads.lane * 8, T.int32(9999))
            ptx.load_matrices(held[0], tile[row], count, transposed)
            for i in range(count):
                B.buffer_store(y, held[i], [(turn * 4 + i) * 32 + threads.lane])

    x, y = random((4, 8, 8), "float16"), np.zeros((3, 4, 32), np.uint32)
    run(built(body, x=((256,), "float16"), y=((384,), "uint32")), X=x, Y=y)
    for count, got in zip(counts, y, strict=True):
        want = np.zeros_like(x)
        want[:count] = x.swapaxes(1, 2)[:count] if transposed else x[:count]
        np.testing.assert_array_equal(got.view(np.uint16), want.reshape(4, 64).view(np.uint16))


@pytest.mark.parametrize("size", [4, 8, 16])
def test_a_copy_that_reads_nothing_writes_zeros(size):
    def body(threads: Threads, x: Any, y: Any) -> None:
        tile, each = part_of(shared_bytes(32 * size), 0, 8 * size, "float32"), size // 4
        first = threads.lane * each
        ptx.copy_async(tile[first], x[first], size, threads.lane % 3 > 0)
        arrived()
        for i in range(each):
            B.buffer_store(y, tile[first + i], [first + i])

    length = 8 * size
    x, y = random((32, size // 4), "float16").astype(np.float32), np.ones(length, np.float32)
    run(built(body, x=((length,), "float32"), y=((length,), "float32")), X=x, Y=y)
    np.testing.assert_array_equal(y.reshape(x.shape), x * (np.arange(32) % 3 > 0)[:, None])


def pipeline(pending: int) -> Any:
    """Build a kernel that starts two groups, waits, and uses both."""

    def body(threads: Threads, x: Any, y: Any) -> None:
        tile, lane = part_of(shared_bytes(256), 0, 64, "float32"), threads.lane
        for group in range(2):
            ptx.copy_async(tile[group * 32 + lane], x[group * 32 + lane], 4)
            ptx.commit_copies()
        ptx.wait_for_copies(pending)
        barrier()
        for group in range(2):
            B.buffer_store(y, tile[group * 32 + 31 - lane], [group * 32 + lane])

    return built(body, x=((64,), "float32"), y=((64,), "float32"))


@pytest.mark.parametrize("pending", [0, 1, 2])
def test_what_was_not_waited_for_may_not_have_arrived(pending):
    x, y = np.arange(64, dtype=np.float32).reshape(2, 32), np.zeros((2, 32), np.float32)
    run(pipeline(pending), X=x, Y=y, copies="late")
    np.testing.assert_array_equal(np.isnan(y).all(axis=1), [pending > 1, pending > 0])
    run(pipeline(pending), X=x, Y=y, copies="early")
    np.testing.assert_array_equal(y, x[:, ::-1])


def test_a_copy_may_overwrite_what_others_still_read():
    def body(threads: Threads, x: Any, y: Any) -> None:
        tile, lane = part_of(shared_bytes(128), 0, 32, "float32"), threads.lane
        ptx.copy_async(tile[lane], x[lane], 4)
        arrived()
        held = local(1)
        B.buffer_store(held, tile[31 - lane], [0])
        # A barrier is missing here.
        ptx.copy_async(tile[lane], x[32 + lane], 4)
        ptx.commit_copies()
        B.buffer_store(y, held[0], [lane])

    function = built(body, x=((64,), "float32"), y=((32,), "float32"))
    x, y = np.arange(64, dtype=np.float32), np.zeros(32, np.float32)
    run(function, X=x, Y=y, copies="late")
    np.testing.assert_array_equal(y, x[31::-1])
    run(function, X=x, Y=y, copies="early")
    assert (y >= 32).any()


def copy_one(at: int, begin: int) -> Any:
    """Build a kernel whose first thread copies 16 bytes between two places, in bytes."""

    def body(threads: Threads, x: Any, y: Any) -> None:
        tile = shared_bytes(64)
        with B.If(threads.lane == 0), B.Then():
            ptx.copy_async(tile[at], x[begin], 16)
        arrived()
        B.buffer_store(y, tile[threads.lane], [threads.lane])

    return built(body, x=((64,), "uint8"), y=((32,), "uint8"))


@pytest.mark.parametrize(
    ("at", "begin", "reason"),
    [
        (8, 0, "misaligned: 16 bytes at offset 8"),
        (0, 4, "from a misaligned address"),
        (64, 0, "offset 64 of 64 bytes of shared memory"),
    ],
)
def test_copies_from_or_to_the_wrong_place_are_refused(at, begin, reason):
    with pytest.raises(KernelFault, match=reason):
        run(copy_one(at, begin), X=np.zeros(64, np.uint8), Y=np.zeros(32, np.uint8))


@pytest.mark.parametrize("many", [False, True])
def test_an_access_behind_shared_memory_is_refused(many):
    def body(threads: Threads, x: Any, y: Any) -> None:
        arrays = [shared(32) for _ in range(1 + many)]
        for array in arrays:
            B.buffer_store(array, T.float32(1), [threads.lane])
        barrier()
        index = local(1, "int32")
        B.buffer_store(index, x[threads.lane], [0])
        # An index that TVM does not know.
        total = sum((array[index[0]] for array in arrays[1:]), arrays[0][index[0]])
        B.buffer_store(y, total, [threads.lane])

    function = built(body, x=((32,), "int32"), y=((32,), "float32"))
    x, y = np.arange(32, dtype=np.int32), np.zeros(32, np.float32)
    run(function, X=x, Y=y)
    np.testing.assert_array_equal(y, 1 + many)
    x[7] = 32 * (1 + many)
    with pytest.raises(KernelFault, match=r"thread \(7, 0, 0\): 4 bytes at offset"):
        run(function, X=x, Y=y)


def test_a_store_beside_a_global_array_is_refused():
    def body(threads: Threads, x: Any, y: Any) -> None:
        B.buffer_store(y, T.float32(1), [x[threads.lane]])

    function = built(body, x=((32,), "int32"), y=((32,), "float32"))
    x = np.arange(32, dtype=np.int32) + 1
    with pytest.raises(KernelFault, match="beside the array y"):
        run(function, X=x, Y=np.zeros(32, np.float32))


def strided(stride: int, vector: int) -> Any:
    """Build a kernel that reads shared memory in vectors of float32, `stride` of them apart."""

    def body(threads: Threads, y: Any) -> None:
        tile = shared(32 * stride * vector)
        held, begin = local(vector), threads.lane * stride * vector
        every = B.ramp(0, 1, vector) if vector > 1 else 0
        from_there = B.ramp(begin, 1, vector) if vector > 1 else begin
        B.buffer_store(held, tile[from_there], [every])
        B.buffer_store(y, held[0], [threads.lane])

    return built(body, y=((32,), "float32"))


@pytest.mark.parametrize(
    ("stride", "vector", "wavefronts", "ideal"),
    [
        (1, 1, 1, 1),
        (3, 1, 1, 1),
        (8, 1, 8, 1),
        (32, 1, 32, 1),
        # Half a warp at a time.
        (1, 2, 2, 2),
        (2, 2, 4, 2),
        # A quarter of a warp at a time.
        (1, 4, 4, 4),
        (3, 4, 4, 4),
        (8, 4, 32, 4),
    ],
)
def test_bank_conflicts_are_counted(stride, vector, wavefronts, ideal):
    y = np.zeros(32, np.float32)
    traffic = run(strided(stride, vector), Y=y, count_conflicts=True)
    assert (traffic.wavefronts, traffic.ideal) == (wavefronts, ideal)
    assert list(traffic.by_site.values()) == [(wavefronts, ideal)]
    assert run(strided(stride, vector), Y=y) == SharedTraffic()


@pytest.mark.parametrize(("pitch", "conflicts"), [(64, 8), (72, 1), (8, 1)])
def test_conflicts_of_ldmatrix_are_counted_by_matrix(pitch, conflicts):
    def body(threads: Threads, y: Any) -> None:
        tile = part_of(shared_bytes(64 * pitch), 0, 32 * pitch, "float16")
        held = whole(local(4, "uint32"))
        ptx.load_matrices(held[0], tile[threads.lane * pitch], 4, False)
        B.buffer_store(y, held[0], [threads.lane])

    function = built(body, y=((32,), "uint32"))
    traffic = run(function, Y=np.zeros(32, np.uint32), count_conflicts=True)
    assert (traffic.wavefronts, traffic.ideal) == (4 * conflicts, 4)


def test_a_word_that_all_lanes_read_is_read_once():
    def body(threads: Threads, y: Any) -> None:
        tile = shared(64)
        with B.If(threads.warp == 0), B.Then():
            B.buffer_store(tile, T.float32(2), [threads.lane])
        barrier()
        with B.serial(0, 3) as i:
            B.buffer_store(y, tile[i], [i * 64 + threads.number])

    function = built(body, 2, y=((192,), "float32"))
    y = np.zeros(192, np.float32)
    traffic = run(function, 2, Y=y, count_conflicts=True)
    # One store of the first warp, three reads of both.
    assert sorted(traffic.by_site.values()) == [(1, 1), (6, 6)]
    assert (y == 2).all()


SHUFFLES: dict[str, tuple[Callable[[Any, Any], Any], Callable[[np.ndarray], np.ndarray]]] = {
    "index": (
        lambda mask, x: T.tvm_warp_shuffle(mask, x, T.int32(5), 32, 32),
        lambda lane: np.full(32, 5),
    ),
    "down": (
        lambda mask, x: T.tvm_warp_shuffle_down(mask, x, T.int32(4), 32, 32),
        lambda lane: np.where(lane < 28, lane + 4, lane),
    ),
    "up": (
        lambda mask, x: T.tvm_warp_shuffle_up(mask, x, T.int32(4), 32, 32),
        lambda lane: np.where(lane >= 4, lane - 4, lane),
    ),
    "xor": (
        lambda mask, x: T.call_intrin(
            "float32", "tirx.tvm_warp_shuffle_xor", mask, x, T.int32(8), 32, 32
        ),
        lambda lane: lane ^ 8,
    ),
    "index in eights": (
        lambda mask, x: T.tvm_warp_shuffle(mask, x, T.int32(5), 8, 32),
        lambda lane: lane // 8 * 8 + 5,
    ),
}


@pytest.mark.parametrize("name", list(SHUFFLES))
def test_shuffles(name):
    shuffle, source = SHUFFLES[name]

    def body(threads: Threads, x: Any, y: Any) -> None:
        held = local(1)
        B.buffer_store(held, x[threads.number], [0])
        B.buffer_store(y, shuffle(T.uint32(0xFFFFFFFF), held[0]), [threads.number])

    x, y = np.arange(64, dtype=np.float32).reshape(2, 32), np.zeros((2, 32), np.float32)
    run(built(body, 2, x=((64,), "float32"), y=((64,), "float32")), 2, X=x, Y=y)
    np.testing.assert_array_equal(y, x[:, source(np.arange(32))])


@pytest.mark.parametrize("otherwise", [False, True])
def test_an_operation_that_only_some_lanes_of_a_warp_come_to_is_refused(otherwise):
    def body(threads: Threads, x: Any, y: Any) -> None:
        held = local(1)
        B.buffer_store(held, x[threads.lane], [0])
        shuffled = T.tvm_warp_shuffle(T.uint32(0xFFFFFFFF), held[0], T.int32(5), 32, 32)
        with B.If(threads.lane < 9):
            with B.Then():
                B.buffer_store(y, shuffled, [threads.lane])
            if otherwise:
                with B.Else():
                    B.buffer_store(y, shuffled + T.float32(1), [threads.lane])

    function = built(body, x=((32,), "float32"), y=((32,), "float32"))
    reason = "warp that diverged" if otherwise else "wait for others that never come.*__shfl_sync"
    with pytest.raises(KernelFault, match=reason):
        run(function, X=np.zeros(32, np.float32), Y=np.zeros(32, np.float32))


def test_a_barrier_that_only_some_warps_come_to_meets_a_shuffle():
    source = """extern "C" __global__ void k(float* __restrict__ y_ptr) {
  if (threadIdx.x < 16) __syncthreads();
  y_ptr[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.0f, 1, 32);
}"""
    with pytest.raises(KernelFault, match=r"in __syncthreads, line 2; .*__shfl_xor_sync, line 3"):
        emulate(source, {"y": np.zeros(32, np.float32)}, [1], [32])


@SHORT
def test_numbers_of_16_bits_round_to_the_nearest_even(dtype):
    def body(threads: Threads, x: Any, w: Any, y: Any, z: Any) -> None:
        i = threads.lane * 2
        both = B.ramp(i, 1, 2)
        B.buffer_store(y, x[both] * x[B.ramp(64, 1, 2)] + x[both], [both])
        B.buffer_store(y, T.Cast(f"{dtype}x2", w[both]), [B.ramp(i + 64, 1, 2)])
        B.buffer_store(y, T.max(x[i], T.Cast(dtype, T.float32(0))) - x[i + 1], [i + 128])
        B.buffer_store(y, T.Select(x[i] < x[i + 1], -x[i], x[i + 1]), [i + 129])
        B.buffer_store(z, T.Cast("float32x2", x[both]), [both])

    number = NUMPY[dtype]
    x, w = random((66,), dtype), random((64,), dtype, 1).astype(np.float32)
    # In the middle of two numbers, a little beside it, and what does not fit.
    step = 2.0 ** (-10 if dtype == "float16" else -7)
    w[:8] = [1 + step / 2, 1 + 1.5 * step, 1 + step / 2 + 1e-6, 1e30, -1e30, 1e-7, np.nan, np.inf]
    y, z = np.zeros((3, 64), number), np.zeros(64, np.float32)
    shapes = {"x": ((66,), dtype), "w": ((64,), "float32"), "y": ((192,), dtype)}
    run(built(body, **shapes, z=((64,), "float32")), X=x, W=w, Y=y, Z=z)
    even, odd = x[:64:2], x[1:64:2]
    with np.errstate(over="ignore"):
        narrow = w.astype(number)
    want = [
        x[:64] * np.tile(x[64:], 32) + x[:64],
        narrow,
        np.stack([np.maximum(even, number(0)) - odd, np.where(even < odd, -even, odd)], 1).ravel(),
    ]
    np.testing.assert_array_equal(y.astype(float), np.array(want, float))
    np.testing.assert_array_equal(z, x[:64].astype(np.float32))


@SHORT
def test_eight_numbers_of_16_bits_are_one_vector(dtype):
    def body(threads: Threads, x: Any, y: Any, z: Any) -> None:
        tile, lane = part_of(shared_bytes(512), 0, 256, dtype), threads.lane
        eight, held = B.ramp(lane * 8, 1, 8), local(8, dtype)
        B.buffer_store(tile, x[eight], [eight])
        barrier()
        B.buffer_store(held, tile[B.ramp(248 - lane * 8, 1, 8)], [B.ramp(0, 1, 8)])
        B.buffer_store(y, held[B.ramp(0, 1, 8)] + x[eight], [eight])
        B.buffer_store(y, T.Broadcast(held[3], 8), [B.ramp(lane * 8 + 256, 1, 8)])
        B.buffer_store(z, T.Cast("float32x8", x[eight]), [eight])

    x, y = random((32, 8), dtype), np.zeros((2, 32, 8), NUMPY[dtype])
    z = np.zeros((32, 8), np.float32)
    shapes = {"x": ((256,), dtype), "y": ((512,), dtype), "z": ((256,), "float32")}
    run(built(body, **shapes), X=x, Y=y, Z=z)
    np.testing.assert_array_equal(y[0], x + x[::-1])
    np.testing.assert_array_equal(y[1], np.repeat(x[::-1, 3:4], 8, axis=1))
    np.testing.assert_array_equal(z, x.astype(np.float32))


def test_bits_are_counted():
    def body(threads: Threads, x: Any, w: Any, b: Any, y: Any) -> None:
        lane, tile = threads.lane, shared(128, "uint8")
        four = B.ramp(lane * 4, 1, 4)
        B.buffer_store(tile, b[four], [four])
        barrier()
        below = T.shift_left(T.uint64(1), T.Cast("uint64", lane)) - T.uint64(1)
        B.buffer_store(y, T.Cast("int32", T.popcount(x[lane] & below)), [lane])
        B.buffer_store(y, T.Cast("int32", T.popcount(w[lane])), [32 + lane])
        narrow = T.Cast("uint32", tile[127 - lane])
        B.buffer_store(y, T.Cast("int32", T.popcount(narrow)), [64 + lane])

    rng = np.random.default_rng(0)
    x, w = rng.integers(0, 2**64, 32, np.uint64), rng.integers(0, 2**32, 32, np.uint32)
    b, y = rng.integers(0, 256, 128, np.uint8), np.zeros((3, 32), np.int32)
    shapes = {"x": ((32,), "uint64"), "w": ((32,), "uint32"), "b": ((128,), "uint8")}
    run(built(body, **shapes, y=((96,), "int32")), X=x, W=w, B=b, Y=y)
    masks = [(1 << lane) - 1 for lane in range(32)]
    want = [
        [(int(v) & m).bit_count() for v, m in zip(x, masks, strict=True)],
        [int(v).bit_count() for v in w],
        [int(v).bit_count() for v in b[:95:-1]],
    ]
    np.testing.assert_array_equal(y, want)


def test_values_go_where_bits_are_set():
    def body(threads: Threads, x: Any, b: Any, y: Any) -> None:
        lane, tile = threads.lane, part_of(shared_bytes(512), 0, 256, "uint16")
        eight = B.ramp(lane * 8, 1, 8)
        B.buffer_store(tile, x[eight], [eight])
        barrier()
        held = whole(local(4, "uint32"))
        ptx.expand_pairs(held[0], tile[lane * 7], b[lane], 4)
        for i in range(4):
            B.buffer_store(y, held[i], [lane * 4 + i])

    rng = np.random.default_rng(0)
    x, b = rng.integers(1, 2**16, 256, np.uint16), rng.integers(0, 256, 32, np.uint32)
    b[:2] = 0, 255
    y = np.zeros(128, np.uint32)
    shapes = {"x": ((256,), "uint16"), "b": ((32,), "uint32"), "y": ((128,), "uint32")}
    traffic = run(built(body, **shapes), X=x, B=b, Y=y, count_conflicts=True)
    for lane, pairs in enumerate(y.view(np.uint16).reshape(32, 8)):
        places = np.flatnonzero(b[lane] >> np.arange(8) & 1)
        want = np.zeros(8, np.uint16)
        want[places] = x[lane * 7 : lane * 7 + len(places)]
        np.testing.assert_array_equal(pairs, want)
    (expanded,) = [counts for line, counts in traffic.by_site.items() if "expand" in line]
    assert expanded[1] == 8


def test_registers_that_tvm_shrank_are_a_fault():
    def body(threads: Threads, x: Any, y: Any) -> None:
        tile, held = part_of(shared_bytes(64), 0, 32, "uint16"), local(4, "uint32")
        B.buffer_store(tile, x[threads.lane], [threads.lane])
        ptx.expand_pairs(held[0], tile[0], T.uint32(0), 4)
        B.buffer_store(y, held[0], [threads.lane])

    x, y = np.zeros(32, np.uint16), np.zeros(32, np.uint32)
    with pytest.raises(KernelFault, match="near the end of an array"):
        run(built(body, x=((32,), "uint16"), y=((32,), "uint32")), X=x, Y=y)


def everything(dtype: str) -> Any:
    """Build a kernel that calls all device functions; what it computes means nothing."""

    def body(threads: Threads, x: Any, y: Any) -> None:
        lane, tile = threads.lane, part_of(shared_bytes(1024), 0, 512, dtype)
        for size in (4, 8, 16):
            at = lane * (size // 2)
            ptx.copy_async(tile[at], x[at], size)
            ptx.copy_async(tile[at], x[at], size, lane < 5)
            ptx.commit_copies()
        for pending in range(4):
            ptx.wait_for_copies(pending)
        barrier()
        held, sums = whole(local(4, "uint32")), local(4)
        clear(sums)
        for count in (1, 2, 4):
            for transposed in (False, True):
                ptx.load_matrices(held[0], tile[lane * 8], count, transposed)
                ptx.multiply(sums[0], held[0], held[0], dtype)
        ptx.expand_pairs(held[0], tile[lane], T.uint32(5), 4)
        for selector in (0, 1):
            ptx.multiply_two_of_four(sums[0], held[0], held[0], held[1], selector, dtype)
        store_sums(y, sums, lane)

    return built(body, x=((512,), dtype), y=((128,), "float32"))


@SHORT
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_the_device_functions_assemble(dtype, arch):
    assert compile_source(NVCC, cuda_source(everything(dtype)), arch)


def two_kernels() -> Any:
    """Build a PrimFunc whose second kernel reads what the first one leaves."""
    with IRBuilder() as builder:
        with B.prim_func():
            B.func_name("pair")
            B.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            n = tirx.Var("n", "int64")
            x = B.arg("x", B.Buffer((n,), "float32"))
            y = B.arg("y", B.Buffer((n,), "float32"))
            middle = B.alloc_buffer((n,), "float32", scope="global")
            IRBuilder.name("middle", middle)
            with launch({"x": n // 64}, 2, 1) as ((block,), threads):
                first, tile = block * 64, shared(64)
                B.buffer_store(tile, x[first + threads.number], [threads.number])
                barrier()
                B.buffer_store(middle, tile[63 - threads.number], [first + threads.number])
            with launch({"x": n // 32}, 1, 1) as ((block,), threads):
                at = block * 32 + threads.lane
                B.buffer_store(y, middle[at] + x[at], [at])
    return builder.get()


def test_kernels_of_a_function_run_one_after_the_other():
    x, y = np.arange(256, dtype=np.float32), np.zeros(256, np.float32)
    function = two_kernels()
    assert launches_of(function, {"n": 256}) == [([4, 1, 1], [32, 2, 1]), ([8, 1, 1], [32, 1, 1])]
    traffic = run_kernels(function, {"x": x, "y": y}, {"n": 256}, count_conflicts=True)
    np.testing.assert_array_equal(y, x.reshape(4, 64)[:, ::-1].ravel() + x)
    assert [t.wavefronts for t in traffic.values()] == [16, 0]
