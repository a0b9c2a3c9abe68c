"""Instructions that TensorIR has no name for: asynchronous copies and tensor cores.

Each is a small device function of inline PTX in the generated source. The tests know these
functions by name, and run them on a processor (`tests/cuda/emulator.hpp`), so a function added here
needs its meaning there. Fragment layouts are those of the PTX ISA, "Matrix fragments for
mma.m16n8k16" and "... for sparse mma.m16n8k32".

TVM does not see what such a function does behind an address: registers and shared memory given to
one come from `threads.whole` and `threads.shared_bytes`, and barriers are the caller's affair.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script import builder as B

_SHORT: dict[str, str] = {"float16": "f16", "bfloat16": "bf16", "float32": "tf32"}
# Columns of A of an instruction, and of one that multiplies two of four.
_COLUMNS: dict[str, tuple[int, int]] = {
    "float16": (16, 32),
    "bfloat16": (16, 32),
    "float32": (8, 16),
}
_AT = "unsigned at = (unsigned)__cvta_generic_to_shared({});"


def _function(name: str, parameters: str, *lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"__device__ __forceinline__ void {name}({parameters}) {{\n{body}\n}}\n"


def _emit(name: str, source: str, *arguments: Any) -> None:
    B.evaluate(T.cuda.func_call(name, *arguments, source_code=source))


def copy_async(to: Any, source: Any, size: int, is_read: Any = None) -> None:
    """Start a copy of 4, 8 or 16 bytes from global to shared memory, aligned on both sides.

    Parameters
    ----------
    to, source : BufferLoad
        The first element on either side.
    size : int
        Bytes.
    is_read : PrimExpr, optional
        Where false, zeros are written and nothing is read; by default it is always read.
    """
    # Only copies of 16 bytes can pass by L1.
    kind = "cg" if size == 16 else "ca"
    copy = f"cp.async.{kind}.shared.global [%0], [%1], {size}"
    if is_read is None:
        name = f"sparse_copy_async_{size}"
        line = f'asm volatile("{copy};" :: "r"(at), "l"(from) : "memory");'
        text = _function(name, "void* to, const void* from", _AT.format("to"), line)
        _emit(name, text, T.address_of(to), T.address_of(source))
        return
    name = f"sparse_copy_async_{size}_if"
    line = f'asm volatile("{copy}, %2;" :: "r"(at), "l"(from), "r"(size) : "memory");'
    count = f"int size = is_read ? {size} : 0;"
    text = _function(name, "void* to, const void* from, int is_read", _AT.format("to"), count, line)
    _emit(name, text, T.address_of(to), T.address_of(source), T.Cast("int32", is_read))


def commit_copies() -> None:
    """Make a group of the copies that were started since the last one."""
    name = "sparse_commit_copies"
    _emit(name, _function(name, "", 'asm volatile("cp.async.commit_group;" ::: "memory");'))


def wait_for_copies(pending: int) -> None:
    """Wait until at most `pending` of this thread's newest groups are under way."""
    name = f"sparse_wait_for_copies_{pending}"
    line = f'asm volatile("cp.async.wait_group {pending};" ::: "memory");'
    _emit(name, _function(name, "", line))


def load_matrices(registers: Any, row: Any, count: int, transposed: bool) -> None:
    """Read 8x8 matrices of 16-bit elements from shared memory (`ldmatrix`).

    Lane 8 i + r points to row r of matrix i; with fewer than four matrices the other lanes'
    addresses are not read. Afterwards register i of lane l holds elements 2 (l % 4) and
    2 (l % 4) + 1 of row l / 4 of matrix i, or of its transpose.

    Parameters
    ----------
    registers : BufferLoad
        The first of `count` uint32 registers.
    row : BufferLoad
        The lane's row of 16 bytes, aligned.
    count : int
        1, 2 or 4 matrices.
    """
    turned = "_transposed" if transposed else ""
    name = f"sparse_load_matrices_{count}{turned}"
    outputs = ", ".join(f"%{i}" for i in range(count))
    written = ", ".join(f'"=r"(to[{i}])' for i in range(count))
    kind = f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    line = f'asm volatile("{kind} {{{outputs}}}, [%{count}];" : {written} : "r"(at) : "memory");'
    text = _function(name, "uint* to, const void* row", _AT.format("row"), line)
    _emit(name, text, T.address_of(registers), T.address_of(row))


def expand_pairs(registers: Any, values: Any, bits: Any, count: int) -> None:
    """Read elements of 16 bits from shared memory where bits are set; the others are zero.

    Register i gets two elements, those of bits 2i and 2i + 1. A set bit takes one value.

    Parameters
    ----------
    registers : BufferLoad
        The first of `count` uint32 registers.
    values : BufferLoad
        The first value.
    bits : PrimExpr
        uint32.
    """
    name = f"sparse_expand_pairs_{count}"
    # Predicates that step over a value in one instruction; from branches nvcc makes two or three.
    lines = [".reg .pred there; .reg .b32 bit, from, high;", f"mov.b32 from, %{count};"]
    for bit in range(2 * count):
        to, is_high = f"%{bit // 2}", bit % 2
        lines += [] if is_high else [f"mov.b32 {to}, 0;"]
        lines += [f"and.b32 bit, %{count + 1}, {1 << bit}; setp.ne.b32 there, bit, 0;"]
        lines += [f"@there ld.shared.u16 {'high' if is_high else to}, [from];"]
        lines += [f"@there prmt.b32 {to}, {to}, high, 0x5410;"] if is_high else []
        lines += ["@there add.u32 from, from, 2;"] if bit + 1 < 2 * count else []
    body = "".join(f'\n    "  {line}\\n"' for line in lines)
    written = ", ".join(f'"=&r"(to[{i}])' for i in range(count))
    text = _function(
        name,
        "uint* to, const void* values, uint bits",
        _AT.format("values"),
        f'asm volatile("{{\\n"{body}',
        f'    "}}" : {written} : "r"(at), "r"(bits) : "memory");',
    )
    _emit(name, text, T.address_of(registers), T.address_of(values), bits)


def multiply(sums: Any, a: Any, b: Any, dtype: str) -> None:
    """Add a 16x16 matrix times a 16x8 matrix to 16x8 float32 sums; of float32, 16x8 times 8x8.

    With g = lane / 4 and t = lane % 4, a lane holds

    - of A, in register i: row g + 8 (i % 2), columns 2t + 8 (i / 2) and the next;
    - of B, in register i: rows 2t + 8i and the next of column g;
    - of the sums, in element i: row g + 8 (i / 2), column 2t + i % 2.

    Parameters
    ----------
    sums, a, b : BufferLoad
        The first of 4 float32, of 4 uint32 and of 2 uint32 registers.
    dtype : str
        "float16", "bfloat16" or "float32", whose last 13 bits are not read (TF32).
    """
    short = _SHORT[dtype]
    name = f"sparse_multiply_{short}"
    kind = f"mma.sync.aligned.m16n8k{_COLUMNS[dtype][0]}.row.col.f32.{short}.{short}.f32"
    text = _function(
        name,
        "float* c, const uint* a, const uint* b",
        f'asm volatile("{kind} {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, '
        '{%0, %1, %2, %3};"',
        '  : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])',
        '  : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));',
    )
    _emit(name, text, T.address_of(sums), T.address_of(a), T.address_of(b))


def multiply_two_of_four(sums: Any, a: Any, b: Any, chosen: Any, selector: int, dtype: str) -> None:
    """Add a 16x32 matrix with two elements in each four of a row times a 32x8 matrix.

    A is held as its 16x16 elements that are kept, laid out as in `multiply`; B in four registers,
    rows 2t + 8i and the next. Which elements are kept stands in `chosen`, two bits each, ascending
    in each pair: bits 0 to 15 are row g, bits 16 to 31 row g + 8, of columns 0 to 15 in lane
    4g + 2 `selector`, of columns 16 to 31 in the lane behind it. Of float32, one element of each
    two is kept, and counts as two: 0 and 1, or 2 and 3.

    Parameters
    ----------
    sums, a, b, chosen : BufferLoad
        The first of 4 float32, of 4, of 4 and of one uint32 registers.
    selector : int
        0 or 1: the lanes of a group of four that hold `chosen`.
    dtype : str
        As for `multiply`.
    """
    short = _SHORT[dtype]
    name = f"sparse_multiply_two_of_four_{short}_{selector}"
    size = f"m16n8k{_COLUMNS[dtype][1]}"
    kind = f"mma.sp::ordered_metadata.sync.aligned.{size}.row.col.f32.{short}.{short}.f32"
    text = _function(
        name,
        "float* c, const uint* a, const uint* b, uint chosen",
        f'asm volatile("{kind} {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9, %10, %11}}, '
        f'{{%0, %1, %2, %3}}, %12, {selector:#x};"',
        '  : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])',
        '  : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),',
        '    "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(chosen));',
    )
    _emit(name, text, T.address_of(sums), T.address_of(a), T.address_of(b), chosen)


def split(big: Any, small: Any, numbers: Any, count: int) -> None:
    """Write float32 numbers as sums of two that TF32 holds, but for 2**-22 of them.

    The first is rounded to 11 digits, half away from zero; the second is the rest, rounded so that
    what tensor cores cut off rounds it, too. Of infinities and NaN the second is NaN.

    Parameters
    ----------
    big, small, numbers : BufferLoad
        The first of `count` uint32 registers.
    """
    name = f"sparse_split_{count}"
    text = _function(
        name,
        "uint* big, uint* small, const uint* x",
        "#pragma unroll",
        f"for (int i = 0; i < {count}; ++i) {{",
        "  big[i] = (x[i] + 0x1000u) & 0xffffe000u;",
        "  small[i] = __float_as_uint(__uint_as_float(x[i]) - __uint_as_float(big[i])) + 0x1000u;",
        "}",
    )
    _emit(name, text, T.address_of(big), T.address_of(small), T.address_of(numbers))
