"""Small models built by TVM's stock pipeline, to run, export and load."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from tvm_sparse.deploy import wrap_executable
from tvm_sparse.manifest import Manifest
from tvm_sparse.model import TensorSpec
from tvm_sparse.runtime import CompiledModule

TARGET = {"kind": "llvm", "mcpu": "x86-64-v2"}
WEIGHT = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)


def build(function: Any, taken: list[Any] | None = None) -> Any:
    """Compile a module; with `taken`, its large constants are taken out into that list."""
    import tvm
    from tvm import relax
    from tvm_sparse.passes.take_out_constants import take_out_constants

    target = tvm.target.Target(TARGET)
    module = relax.BlockBuilder()
    function(module)
    pipeline = relax.get_default_pipeline(target)
    if taken is not None:
        pipeline = tvm.transform.Sequential([pipeline, take_out_constants(taken)])
    return tvm.compile(module.get(), target, relax_pipeline=pipeline)


def manifest(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], **more: Any
) -> Manifest:
    fields: dict[str, Any] = {
        "package_version": "0.1.0",
        "tvm_version": "0.27.0",
        "target": TARGET,
        "cpu_features": ("sse4.2",),
        "threads": 1,
        "inputs": inputs,
        "outputs": outputs,
    }
    return Manifest(**{**fields, **more})


@cache
def pair_executable() -> Any:
    """y = relu(x @ W) + z; twice = y + y; for x (batch, 8) and z (batch, 5)."""
    from tvm import relax, tirx

    def function(bb: Any) -> None:
        batch = tirx.Var("batch", "int64")
        x = relax.Var("x", relax.TensorType((batch, 8), "float32"))
        z = relax.Var("z", relax.TensorType((batch, 5), "float32"))
        with bb.function("main", [x, z]):
            with bb.dataflow():
                h = bb.emit(relax.op.nn.relu(bb.emit(relax.op.matmul(x, relax.const(WEIGHT)))))
                y = bb.emit(relax.op.add(h, z))
                twice = bb.emit(relax.op.add(y, y))
                out = bb.emit_output(relax.Tuple([y, twice]))
            bb.emit_func_output(out)

    return build(function)


def pair_manifest(**more: Any) -> Manifest:
    return manifest(
        (TensorSpec("x", ("batch", 8), "float32"), TensorSpec("z/0", ("batch", 5), "float32")),
        (TensorSpec("y", ("batch", 5), "float32"), TensorSpec("twice", ("batch", 5), "float32")),
        **{"kernels": {"fused_matmul_relu_add": ("fc",)}, **more},
    )


def pair_module(**more: Any) -> CompiledModule:
    return wrap_executable(pair_executable(), pair_manifest(**more))


def pair_inputs(batch: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((batch, 8)).astype(np.float32),
        rng.standard_normal((batch, 5)).astype(np.float32),
    )


def pair_outputs(x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y = np.maximum(x.astype(np.float64) @ WEIGHT, 0) + z
    return y, 2 * y


def assert_pair(outputs: Any, x: np.ndarray, z: np.ndarray) -> None:
    wanted = pair_outputs(np.asarray(x), np.asarray(z))
    for got, want in zip(outputs, wanted, strict=True):
        assert got.dtype == np.float32 and got.shape == want.shape
        # Eleven roundings, each of at most the largest sum of magnitudes that occurs here.
        np.testing.assert_allclose(got, want, rtol=0, atol=11 * 2**-24 * 100)


@cache
def chain_executable() -> Any:
    """Two layers of the same shape, which TVM gives one kernel."""
    from tvm import relax

    def function(bb: Any) -> None:
        x = relax.Var("x", relax.TensorType((4, 8), "float32"))
        weights = [np.full((8, 8), value, np.float32) for value in (0.5, 2.0)]
        with bb.function("main", [x]):
            with bb.dataflow():
                h = bb.emit(relax.op.matmul(x, relax.const(weights[0])))
                out = bb.emit_output(bb.emit(relax.op.matmul(h, relax.const(weights[1]))))
            bb.emit_func_output(out)

    return build(function)


def chain_module(**more: Any) -> CompiledModule:
    spec = TensorSpec("x", (4, 8), "float32"), TensorSpec("y", (4, 8), "float32")
    return wrap_executable(chain_executable(), manifest((spec[0],), (spec[1],), **more))


@cache
def passing_executable() -> Any:
    """Outputs that the model does not compute: its input, a constant, and a flag turned over."""
    from tvm import relax

    def function(bb: Any) -> None:
        x = relax.Var("x", relax.TensorType((4,), "float32"))
        flag = relax.Var("flag", relax.TensorType((2,), "bool"))
        with bb.function("main", [x, flag]):
            with bb.dataflow():
                turned = bb.emit(relax.op.logical_not(flag))
                constant = relax.const(np.arange(3, dtype=np.float32))
                out = bb.emit_output(relax.Tuple([x, constant, turned]))
            bb.emit_func_output(out)

    return build(function)


def passing_module() -> CompiledModule:
    specs = (TensorSpec("x", (4,), "float32"), TensorSpec("flag", (2,), "bool"))
    outputs = (
        TensorSpec("same", (4,), "float32"),
        TensorSpec("constant", (3,), "float32"),
        TensorSpec("turned", (2,), "bool"),
    )
    return wrap_executable(passing_executable(), manifest(specs, outputs))


LARGE = np.random.default_rng(1).integers(-9, 10, (96, 64)).astype(np.float32)
LARGE_BIAS = np.random.default_rng(2).integers(-9, 10, (128, 64)).astype(np.int64)


@cache
def large_executable() -> tuple[Any, tuple[Any, ...]]:
    """y = (x @ LARGE).astype(int64) + LARGE_BIAS, and the weights that were taken out."""
    from tvm import relax

    def function(bb: Any) -> None:
        x = relax.Var("x", relax.TensorType((128, 96), "float32"))
        with bb.function("main", [x]):
            with bb.dataflow():
                product = bb.emit(relax.op.matmul(x, relax.const(LARGE)))
                whole = bb.emit(relax.op.astype(product, "int64"))
                bias = relax.const(LARGE_BIAS, "int64")
                out = bb.emit_output(bb.emit(relax.op.add(whole, bias)))
            bb.emit_func_output(out)

    taken: list[Any] = []
    return build(function, taken), tuple(taken)


def large_module() -> CompiledModule:
    executable, weights = large_executable()
    specs = TensorSpec("x", (128, 96), "float32"), TensorSpec("y", (128, 64), "int64")
    return wrap_executable(executable, manifest((specs[0],), (specs[1],)), weights=weights)


def large_input() -> np.ndarray:
    return np.random.default_rng(3).integers(-9, 10, (128, 96)).astype(np.float32)


def large_output(x: np.ndarray) -> np.ndarray:
    """Exact: whole numbers, whose sums float32 holds."""
    return (x @ LARGE).astype(np.int64) + LARGE_BIAS
