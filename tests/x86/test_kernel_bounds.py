"""No kernel touches a byte outside of its buffers, its scratch memory included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from dense_support import WIDTHS, target_of
from guard_pages import PLACES, GuardedArray, build_scratch_guard, guard_scratch, run_in_child
from kernel_cases import Case, all_cases, chosen_cases
from layer_reference import operands, reference, weight_for
from panel_support import build_kernel
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as B

from tvm_sparse.check import compare

CHOICES = {"chosen": chosen_cases, "all": all_cases}
# A kernel that dies takes its process along; the next process goes on behind it, so often.
_MOST_DEATHS = 8


@pytest.fixture(scope="module")
def scratch_guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = build_scratch_guard(tmp_path_factory.mktemp("guard"))
    if library is None:
        pytest.skip("no C compiler")
    return library


def call_guarded(kernel: Any, inputs: list[np.ndarray], result: np.ndarray, place: Any) -> Any:
    """Call a kernel on guarded copies; the result starts as NaN."""
    guarded = [GuardedArray(np.ascontiguousarray(array), place) for array in inputs]
    out = GuardedArray(result, place)
    kernel(*[tvm_ffi.from_dlpack(item.array) for item in [*guarded, out]])
    for index, item in enumerate([*guarded, out]):
        assert item.surroundings_are_intact(), f"wrote around argument {index}"
    for index, (item, array) in enumerate(zip(guarded, inputs, strict=True)):
        assert item.array.tobytes() == array.tobytes(), f"wrote to argument {index}, an input"
    return out.array.copy()


def check_case(case: Case, seed: int) -> None:
    """Hold one kernel against float64 with its buffers at either guard page."""
    workload, shape = case.workload, case.shape
    weight = weight_for(workload.geometry, shape.density, seed)
    kernel = build_kernel(case.template, workload, weight, case.lanes, case.config)
    x, channels, tensors, out_shape = operands(workload, shape.batch, seed)
    want, bound = reference(workload, weight, x, channels, tensors)
    for place in PLACES:
        result = np.full(out_shape, np.nan, np.float32)
        inputs = [x, *kernel.arrays, *channels, *tensors]
        got = call_guarded(kernel.call, inputs, result, place)
        check = compare(f"guard page at the {place}", got, want, bound)
        assert check.ok, check


def sweep(op: str, lanes: str, choice: str, scratch_guard: str, first: str) -> None:
    """Check cases from number `first` on, in a child: print each, and what is wrong with it."""
    guard_scratch(scratch_guard)
    for index, case in enumerate(CHOICES[choice](op, int(lanes))):
        if index < int(first):
            continue
        print(f"case {index}: {case}", flush=True)
        try:
            check_case(case, index)
        except AssertionError as error:
            print(f"wrong {index}: {error}", flush=True)
    print("end")


def assert_no_strays(op: str, lanes: int, choice: str, scratch_guard: Path) -> None:
    target_of(lanes)  # skips where this processor has no such vectors
    wrong: list[str] = []
    first = 0
    for _ in range(_MOST_DEATHS):
        ending, lines = run_in_child(
            "test_kernel_bounds", "sweep", op, lanes, choice, scratch_guard, first
        )
        cases = [line for line in lines if line.startswith("case ")]
        wrong += [
            f"{lines[at - 1]}\n  {line}"
            for at, line in enumerate(lines)
            if line.startswith("wrong ")
        ]
        if not ending:
            assert cases and lines[-1] == "end"
            break
        wrong.append(f"{cases[-1] if cases else 'before the first case'}\n  {ending}")
        if not ending.startswith("SIG"):
            break
        first += len(cases)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("lanes", list(WIDTHS))
@pytest.mark.parametrize("op", ["matmul", "conv2d"])
def test_no_kernel_strays(op: str, lanes: int, scratch_guard: Path) -> None:
    assert_no_strays(op, lanes, "chosen", scratch_guard)


@pytest.mark.slow
@pytest.mark.parametrize("lanes", list(WIDTHS))
@pytest.mark.parametrize("op", ["matmul", "conv2d"])
def test_no_configuration_strays_on_any_shape(op: str, lanes: int, scratch_guard: Path) -> None:
    assert_no_strays(op, lanes, "all", scratch_guard)


def copying_kernel(length: int, offset: int, through_scratch: bool, to: str) -> Any:
    """y[i] = x[i], with one side shifted by `offset`: a kernel that strays."""
    large = 1024  # smaller scratch memory stands on the stack
    with IRBuilder() as builder:
        with B.prim_func():
            B.func_name("kernel")
            x = B.arg("x", B.Buffer((length,), "float32"))
            y = B.arg("y", B.Buffer((length,), "float32"))
            source = x
            if through_scratch:
                source = B.alloc_buffer((large,), "float32", scope="global")
                with B.serial(0, large) as i:
                    B.buffer_store(source, x[i % length], [i])
            with B.serial(0, length) as i:
                read, write = (i + offset, i) if to == "read" else (i, i + offset)
                shift = large - length if through_scratch else 0
                B.buffer_store(y, source[read + shift], [write])
    function = builder.get().with_attr("global_symbol", "kernel")
    return tvm.compile(function, tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v2"}))


def stray(length: str, offset: str, memory: str, access: str, place: str, guard: str) -> None:
    """Run the copying kernel in a child, and print the last element of the result."""
    guard_scratch(guard)
    kernel = copying_kernel(int(length), int(offset), memory == "scratch", access)["kernel"]
    x = np.ones(int(length), np.float32)
    print(call_guarded(kernel, [x], np.zeros_like(x), place).sum())


@pytest.mark.parametrize(
    ("length", "offset", "memory", "access", "place", "ending", "printed"),
    [
        (64, 0, "arguments", "read", "rear", "", "64.0"),
        (64, 1, "arguments", "read", "rear", "SIGSEGV", None),
        (64, -1, "arguments", "read", "front", "SIGSEGV", None),
        (64, 1, "arguments", "write", "rear", "SIGSEGV", None),
        (63, 1, "arguments", "read", "rear", "", "nan"),
        (63, 1, "arguments", "write", "rear", "wrote around argument 1", None),
        (64, 0, "scratch", "read", "rear", "", "64.0"),
        (64, 1, "scratch", "read", "front", "SIGSEGV", None),
    ],
)
def test_a_straying_kernel_is_caught(
    length: int,
    offset: int,
    memory: str,
    access: str,
    place: str,
    ending: str,
    printed: str | None,
    scratch_guard: Path,
) -> None:
    found, lines = run_in_child(
        "test_kernel_bounds", "stray", length, offset, memory, access, place, scratch_guard
    )
    assert ending in found and bool(found) == bool(ending), found
    assert printed is None or lines[-1] == printed
