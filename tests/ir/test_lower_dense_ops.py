"""Operators without a weight become calls of kernels; what has no kernel is left alone."""

from __future__ import annotations

import pytest
import tvm
from tvm import relax, tirx
from tvm_sparse.passes.lower_dense_ops import RULES, LowerDenseOps, Site

from tvm_sparse.targets import X86Machine

MACHINE = X86Machine(mcpu="x86-64-v3", lanes=8, registers=16)


def lowered(build, *shapes, dtype="float32"):
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(s, dtype)) for i, s in enumerate(shapes)]
    with builder.function("main", inputs):
        with builder.dataflow():
            output = builder.emit_output(build(builder.emit, *inputs))
        builder.emit_func_output(output)
    return LowerDenseOps(MACHINE)(builder.get())


def kernels(mod):
    return sorted(name.name_hint for name in mod.get_global_vars() if name.name_hint != "main")


def operators(mod):
    """Names of the operators that `main` still calls."""
    names = []
    relax.analysis.post_order_visit(
        mod["main"],
        lambda e: (
            names.append(e.op.name)
            if isinstance(e, relax.Call) and isinstance(e.op, tvm.ir.Op)
            else None
        ),
    )
    return names


IMAGE = (2, 3, 8, 8)
TAKEN = {
    "relax.nn.softmax": (lambda e, x: e(relax.op.nn.softmax(x, -1)), [(2, 9)]),
    "relax.nn.log_softmax": (lambda e, x: e(relax.op.nn.log_softmax(x, 1)), [(2, 9)]),
    "relax.nn.layer_norm": (
        lambda e, x, g, b: e(relax.op.nn.layer_norm(x, g, b, [-1])),
        [(2, 9), (9,), (9,)],
    ),
    "relax.nn.rms_norm": (lambda e, x, g: e(relax.op.nn.rms_norm(x, g, [-1])), [(2, 9), (9,)]),
    "relax.nn.max_pool2d": (lambda e, x: e(relax.op.nn.max_pool2d(x, (3, 3), (2, 2))), [IMAGE]),
    "relax.nn.avg_pool2d": (lambda e, x: e(relax.op.nn.avg_pool2d(x, (2, 2), (2, 2))), [IMAGE]),
    "relax.nn.adaptive_avg_pool2d": (
        lambda e, x: e(relax.op.nn.adaptive_avg_pool2d(x, (1, 1))),
        [IMAGE],
    ),
    "relax.mean": (lambda e, x: e(relax.op.mean(x, [2, 3])), [IMAGE]),
    "relax.sum": (lambda e, x: e(relax.op.sum(x)), [IMAGE]),
    "relax.max": (lambda e, x: e(relax.op.max(x, [-1], keepdims=True)), [IMAGE]),
    "relax.min": (lambda e, x: e(relax.op.min(x, -1)), [IMAGE]),
    "relax.permute_dims": (lambda e, x: e(relax.op.permute_dims(x, [0, 2, 3, 1])), [IMAGE]),
    "relax.image.resize2d": (
        lambda e, x: e(relax.op.image.resize2d(x, (16, 24), method="nearest_neighbor")),
        [IMAGE],
    ),
    "relax.nn.conv2d": (
        lambda e, x, w: e(relax.op.nn.conv2d(x, w, padding=(1, 1), groups=3)),
        [IMAGE, (6, 1, 3, 3)],
    ),
    "relax.matmul": (lambda e, a, b: e(relax.op.matmul(a, b)), [(2, 3, 4), (2, 4, 5)]),
}


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_operator_of_the_table_is_replaced(name):
    build, shapes = TAKEN[name]
    mod = lowered(build, *shapes)
    assert operators(mod) == ["relax.call_tir"]
    assert len(kernels(mod)) == 1


@pytest.mark.parametrize(
    ("name", "build", "shapes", "dtype"),
    [
        ("relax.nn.softmax", lambda e, x: e(relax.op.nn.softmax(x, 0)), [(2, 9)], "float32"),
        ("relax.nn.softmax", lambda e, x: e(relax.op.nn.softmax(x, -1)), [(2, 9)], "float16"),
        ("relax.mean", lambda e, x: e(relax.op.mean(x, [1])), [IMAGE], "float32"),
        ("relax.matmul", lambda e, a, b: e(relax.op.matmul(a, b)), [(4,), (4, 5)], "float32"),
        (
            "relax.nn.max_pool2d",
            lambda e, x: e(relax.op.nn.max_pool2d(x, (2, 2), (2, 2), layout="NHWC")),
            [IMAGE],
            "float32",
        ),
        (
            "relax.nn.max_pool2d",
            lambda e, x: e(relax.op.nn.max_pool2d(x, (3, 3), (3, 3))),
            [IMAGE],
            "float32",
        ),
        (
            "relax.nn.adaptive_avg_pool2d",
            lambda e, x: e(relax.op.nn.adaptive_avg_pool2d(x, (2, 2))),
            [IMAGE],
            "float32",
        ),
    ],
)
def test_what_has_no_kernel_is_left_alone(name, build, shapes, dtype):
    mod = lowered(build, *shapes, dtype=dtype)
    assert operators(mod) == [name]
    assert kernels(mod) == []


def test_equal_calls_share_one_function_and_others_do_not():
    def build(emit, x, y):
        a = emit(relax.op.nn.softmax(x, -1))
        b = emit(relax.op.nn.softmax(a, -1))
        c = emit(relax.op.nn.softmax(y, -1))
        return emit(relax.op.concat([b, c], 1))

    assert kernels(lowered(build, (2, 9), (2, 5))) == ["softmax", "softmax1"]


def test_equal_symbols_become_equal_dimensions():
    length = tirx.Var("length", "int64")
    a = relax.Var("a", relax.TensorType((2, length, length + 1), "float32"))
    b = relax.Var("b", relax.TensorType((2, length + 1, length), "float32"))
    call = relax.BlockBuilder().normalize(relax.op.matmul(a, b))
    kernel = RULES["relax.matmul"](Site(call, MACHINE))
    assert kernel.arguments[:2] == ((2, "d0", "d1"), (2, "d1", "d0"))


def test_the_result_is_well_formed():
    build, shapes = TAKEN["relax.nn.layer_norm"]
    relax.analysis.well_formed(lowered(build, *shapes))  # raises when it is not
