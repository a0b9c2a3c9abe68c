"""The pipeline "sparse" inside TVM: `tvm.compile`, `ts.build`, modules of every kind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import warnings
from typing import Any

import numpy as np
import pytest
import tvm
from dense_support import target_of
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

import tvm_sparse as ts
from tvm_sparse.errors import PlanError, RecordError, TargetError
from tvm_sparse.plugin import PIPELINE, register, sparse_pipeline

RNG = np.random.default_rng(0)
X = RNG.standard_normal((16, 64)).astype(np.float32)


def sparse_weight(rows: int, columns: int) -> np.ndarray:
    weight = RNG.standard_normal((rows, columns)).astype(np.float32)
    weight[RNG.random(weight.shape) < 0.9] = 0
    return weight


W, V = sparse_weight(64, 48), sparse_weight(64, 32)


def add_function(
    builder: relax.BlockBuilder, name: str, weight: np.ndarray, free: bool = False
) -> None:
    """Add ``relu(x @ weight)``; a free weight is a parameter."""
    x = relax.Var("x", relax.TensorType((16, weight.shape[0]), "float32"))
    w = relax.Var("w", relax.TensorType(weight.shape, "float32"))
    with builder.function(name, [x, w] if free else [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, w if free else relax.const(weight)))
            y = builder.emit_output(relax.op.nn.relu(y))
        builder.emit_func_output(y)


def module_of(**weights: np.ndarray) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    for name, weight in weights.items():
        add_function(builder, name, weight)
    return builder.get()


def free_module() -> tvm.IRModule:
    builder = relax.BlockBuilder()
    add_function(builder, "main", W, free=True)
    return builder.get()


def run(executable: Any, name: str, *arrays: np.ndarray) -> np.ndarray:
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return machine[name](*[tvm.runtime.tensor(array) for array in arrays]).numpy()


def kernels_of(executable: Any) -> int:
    """How many sparse kernels an executable calls."""
    return len(set(re.findall(r"(?:tiled|ell)_matmul_\d+", executable.as_text())))


def assert_is_relu(y: np.ndarray, weight: np.ndarray) -> None:
    np.testing.assert_allclose(y, np.maximum(X @ weight, 0), rtol=0, atol=2e-5)


def test_the_pipeline_is_known_as_soon_as_tvm_is_imported():
    program = """
        import sys
        import numpy as np
        import tvm
        from tvm import relax

        rng = np.random.default_rng(0)
        w = rng.standard_normal((64, 48)).astype("float32") * (rng.random((64, 48)) < 0.1)
        builder = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType((16, 64), "float32"))
        with builder.function("main", [x]):
            with builder.dataflow():
                y = builder.emit_output(relax.op.matmul(x, relax.const(w)))
            builder.emit_func_output(y)
        target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v2"})
        executable = tvm.compile(builder.get(), target, relax_pipeline="sparse")
        machine = relax.VirtualMachine(executable, tvm.cpu())
        data = rng.standard_normal((16, 64)).astype("float32")
        y = machine["main"](tvm.runtime.tensor(data)).numpy()
        print(float(np.abs(y - data @ w).max()) < 1e-4, "matmul_1" in executable.as_text())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True", "True"]


def test_the_runtime_alone_is_imported_without_a_word():
    done = subprocess.run(
        [sys.executable, "-c", "import tvm, sys; print('tvm_sparse.compiler' in sys.modules)"],
        env={**os.environ, "TVM_USE_RUNTIME_LIB": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["False"]
    assert "tvm_sparse" not in done.stderr


def test_importing_tvm_does_not_load_the_compiler():
    program = "import tvm, sys; print([m for m in sys.modules if m == 'tvm_sparse.compiler'])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stderr[-2000:]


def test_registering_twice_changes_nothing():
    from tvm.relax.pipeline import PIPELINE_MAP

    register()
    before = PIPELINE_MAP[PIPELINE]
    register()
    assert PIPELINE_MAP[PIPELINE] is before


def test_constants_get_sparse_kernels():
    executable = tvm.compile(module_of(main=W), target_of(8), relax_pipeline="sparse")
    assert kernels_of(executable) == 1
    assert_is_relu(run(executable, "main", X), W)


@pytest.mark.parametrize("names", [("main", "second"), ("second", "main"), ("first", "second")])
def test_every_entry_function_gets_kernels(names):
    mod = module_of(**dict(zip(names, (W, V), strict=True)))
    executable = tvm.compile(mod, target_of(8), relax_pipeline="sparse")
    assert kernels_of(executable) == 2
    for name, weight in zip(names, (W, V), strict=True):
        assert_is_relu(run(executable, name, X), weight)


def test_functions_that_call_each_other_still_do():
    mod = module_of(helper=W)
    builder = relax.BlockBuilder(mod)
    x = relax.Var("x", relax.TensorType((16, 64), "float32"))
    with builder.function("main", [x]):
        y = builder.emit(relax.Call(builder.get().get_global_var("helper"), [x]))
        builder.emit_func_output(y)
    executable = tvm.compile(builder.get(), target_of(8), relax_pipeline="sparse")
    assert_is_relu(run(executable, "main", X), W)
    assert_is_relu(run(executable, "helper", X), W)


def test_free_parameters_stay_inputs_and_their_layer_dense():
    executable = tvm.compile(free_module(), target_of(8), relax_pipeline="sparse")
    assert kernels_of(executable) == 0
    assert_is_relu(run(executable, "main", X, W), W)


def test_bound_parameters_are_constants():
    mod = relax.transform.BindParams("main", {"w": W})(free_module())
    executable = tvm.compile(mod, target_of(8), relax_pipeline="sparse")
    assert kernels_of(executable) == 1
    assert_is_relu(run(executable, "main", X), W)


@pytest.mark.parametrize("target", ["llvm", "x86-64-v3", {"kind": "llvm", "mcpu": "x86-64-v3"}])
@pytest.mark.parametrize("kind", ["numpy", "tvm"])
def test_build_has_the_shape_of_relays(target, kind):
    value = W if kind == "numpy" else tvm.runtime.tensor(W)
    executable = ts.build(free_module(), target, {"w": value})
    assert kernels_of(executable) == 1
    assert_is_relu(run(executable, "main", X), W)


def test_build_takes_the_options_of_a_plan():
    mod = module_of(main=W)
    assert kernels_of(ts.build(mod, "x86-64-v3", forbid=["*"])) == 0
    assert kernels_of(ts.build(mod, "x86-64-v3", force={"*": "register_tiled"}, threads=2)) == 1


def test_tuning_records_reach_the_planner(tmp_path):
    records = tmp_path / "records.jsonl"
    mod = module_of(main=W)
    with pytest.raises(RecordError, match="no file"):
        sparse_pipeline(records=records)
    ts.tune(mod, trials=2, records=records, threads=1)
    assert ts.plan(mod, records=records, threads=1).decisions[0].source == "record"
    built = ts.build(mod, threads=1, records=records)
    got = relax.VirtualMachine(built, tvm.cpu())["main"](tvm.runtime.tensor(X)).numpy()
    np.testing.assert_allclose(got, np.maximum(X @ W, 0), rtol=0, atol=1e-4)


def test_options_of_the_pipeline_reach_the_planner():
    pipeline = relax.get_pipeline(PIPELINE, threads=2, forbid=["*"])
    executable = tvm.compile(module_of(main=W), target_of(8), relax_pipeline=pipeline)
    assert kernels_of(executable) == 0
    assert_is_relu(run(executable, "main", X), W)


def test_a_pattern_may_fit_one_function_only_but_must_fit_one():
    mod = module_of(main=W, second=V)
    (name,) = [layer.name for layer in ts.inspect(mod).layers]
    executable = tvm.compile(mod, target_of(8), relax_pipeline=sparse_pipeline(forbid=[name]))
    assert kernels_of(executable) == 1
    with pytest.raises((PlanError, RuntimeError), match="no layer is called 'fc9'"):
        tvm.compile(mod, target_of(8), relax_pipeline=sparse_pipeline(forbid=["fc9"]))


@I.ir_module
class Branching:
    @R.function
    def main(x: R.Tensor((16, 64), "float32"), c: R.Tensor((), "bool")) -> R.Tensor(
        (16, 64), "float32"
    ):
        if c:
            y = R.nn.relu(x)
            z = R.add(y, y)
        else:
            z = R.multiply(x, x)
        return z


@I.ir_module
class Local:
    @R.function
    def main(x: R.Tensor((16, 64), "float32")) -> R.Tensor((16, 64), "float32"):
        @R.function
        def inner(a: R.Tensor((16, 64), "float32")) -> R.Tensor((16, 64), "float32"):
            b = R.nn.relu(a)
            return b

        y = inner(x)
        return y


def test_what_stands_in_branches_stays_dense_and_a_warning_says_why():
    with pytest.warns(UserWarning, match="in 'main': .* branches at run time, and what stands in"):
        executable = tvm.compile(Branching, target_of(8), relax_pipeline="sparse")
    for flag, expected in ((True, 2 * np.maximum(X, 0)), (False, X * X)):
        np.testing.assert_array_equal(run(executable, "main", X, np.array(flag)), expected)


def test_one_function_that_branches_does_not_keep_another_from_its_kernel():
    functions = {
        tvm.ir.GlobalVar("main"): module_of(main=W)["main"],
        tvm.ir.GlobalVar("branching"): Branching["main"].with_attr("global_symbol", "branching"),
    }
    with pytest.warns(UserWarning, match="in 'branching': .* branches at run time"):
        executable = tvm.compile(tvm.IRModule(functions), target_of(8), relax_pipeline="sparse")
    assert kernels_of(executable) == 1
    assert_is_relu(run(executable, "main", X), W)
    np.testing.assert_array_equal(run(executable, "branching", X, np.array(False)), X * X)


def test_local_functions_are_lifted_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        executable = tvm.compile(Local, target_of(8), relax_pipeline="sparse")
    np.testing.assert_array_equal(run(executable, "main", X), np.maximum(X, 0))


def test_a_module_without_weights_compiles():
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((16, 64), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(relax.op.nn.softmax(x))
        builder.emit_func_output(y)
    executable = tvm.compile(builder.get(), target_of(8), relax_pipeline="sparse")
    np.testing.assert_allclose(run(executable, "main", X).sum(1), 1, rtol=1e-5)


def test_a_target_without_kernels_is_refused_in_words():
    arm = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}
    with pytest.raises((TargetError, RuntimeError), match="'cortex-a72' is not an x86 processor"):
        tvm.compile(module_of(main=W), tvm.target.Target(arm), relax_pipeline="sparse")


def test_the_module_that_was_given_is_not_changed():
    mod = module_of(main=W, second=V)
    before = mod.script()
    tvm.compile(mod, target_of(8), relax_pipeline="sparse")
    assert mod.script() == before


def test_an_executable_is_exported_and_loaded_as_any_other_of_tvm(tmp_path):
    executable = ts.build(module_of(main=W), "x86-64-v3")
    place = str(tmp_path / "lib.so")
    executable.export_library(place)
    machine = relax.VirtualMachine(tvm.runtime.load_module(place), tvm.cpu())
    assert_is_relu(machine["main"](tvm.runtime.tensor(X)).numpy(), W)
