"""Relax modules: bound and free parameters, other functions, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from load_support import assert_close, ops_of, random, run_model
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T
from tvm_sparse.passes.canonicalize import check_canonical
from tvm_sparse.passes.collect_weights import collect_weights

from tvm_sparse.errors import ModelError
from tvm_sparse.frontends.loading import load


@I.ir_module
class Free:
    @R.function
    def main(
        x: R.Tensor(("n", 8), "float32"),
        w: R.Tensor((5, 8), "float32"),
        b: R.Tensor((5,), "float32"),
    ) -> R.Tensor(("n", 5), "float32"):
        with R.dataflow():
            wt = R.permute_dims(w)
            y = R.add(b, R.matmul(x, wt))
            R.output(y)
        return y


@pytest.fixture
def values() -> dict[str, np.ndarray]:
    return {"w": random(5, 8), "b": random(5, seed=1)}


def expected(x: np.ndarray, values: dict[str, np.ndarray]) -> np.ndarray:
    return x @ values["w"].T + values["b"]


def check(model: Any, values: dict[str, np.ndarray]) -> None:
    assert check_canonical(model) == []
    assert ops_of(model) == ["matmul", "add"]
    x = random(3, 8, seed=2)
    assert_close(run_model(model, x)[0], expected(x, values))


def test_free_parameters_take_their_values_from_params(values):
    model = load(Free, params=values)
    check(model, values)
    assert [spec.shape for spec in model.inputs] == [("n", 8)]
    assert [spec.shape for spec in model.outputs] == [("n", 5)]


def test_values_may_be_tvm_tensors(values):
    check(load(Free, params={k: tvm.runtime.tensor(v) for k, v in values.items()}), values)


def test_bound_parameters_are_found_in_the_body(values):
    model = load(relax.transform.BindParams("main", values)(Free))
    check(model, values)
    assert len(model.params) == 2


def test_parameters_attached_by_an_importer(values):
    func = Free["main"].with_attr("num_input", 1)
    func = func.with_attr("params", [tvm.runtime.tensor(v) for v in values.values()])
    check(load(tvm.IRModule({"main": func})), values)


def test_without_values_every_parameter_is_an_input():
    model = load(Free)
    assert [spec.name for spec in model.inputs] == ["x", "w", "b"]
    assert not model.params


def test_shapes_bind_symbolic_dimensions(values):
    model = load(Free, params=values, shapes={"x": (4, 8)})
    assert model.inputs[0].shape == (4, 8)
    assert model.outputs[0].shape == (4, 5)


def test_a_model_is_returned_as_it_is(values):
    model = load(Free, params=values)
    assert load(model) is model


def test_canonicalising_twice_changes_nothing(values):
    model = load(Free, params=values)
    again = load(model.mod, params=dict(model.params))
    tvm.ir.assert_structural_equal(model.mod["main"], again.mod["main"])


@I.ir_module
class WithKernel:
    @T.prim_func(s_tir=True)
    def twice(a: T.Buffer((4,), "float32"), b: T.Buffer((4,), "float32")):
        with T.sblock("root"):
            for i in range(4):
                b[i] = a[i] * T.float32(2)

    @R.function
    def main(x: R.Tensor((4,), "float32")) -> R.Tensor((4,), "float32"):
        cls = WithKernel
        with R.dataflow():
            y = R.call_tir(cls.twice, (x,), out_ty=R.Tensor((4,), "float32"))
            z = R.add(y, R.const(0.0, "float32"))
            R.output(z)
        return z


def test_other_functions_of_the_module_are_kept():
    model = load(WithKernel)
    kept = {gvar.name_hint: func for gvar, func in model.mod.functions_items()}
    assert kept["twice"].same_as(WithKernel["twice"])
    x = random(4)
    np.testing.assert_array_equal(run_model(model, x)[0], 2 * x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"w": random(8, 5)}, "the value of 'w' is float32 (8, 5), but 'main' declares float32"),
        ({"w": random(5, 8).astype("f8")}, "the value of 'w' is float64"),
        ({"v": random(3)}, "'main' has no parameter 'v'"),
    ],
)
def test_values_that_do_not_fit(values, change, words):
    with pytest.raises(ModelError, match=words.replace("(", r"\(").replace(")", r"\)")):
        load(Free, params=values | change)


def test_a_weight_without_a_value():
    func = Free["main"].with_attr("num_input", 1)
    with pytest.raises(ModelError, match="the weight 'w' of 'main' has no value"):
        load(tvm.IRModule({"main": func}))


def test_a_module_without_main():
    with pytest.raises(ModelError, match="no Relax function called 'main'"):
        load(tvm.IRModule({"other": Free["main"]}))


@I.ir_module
class Branching:
    @R.function
    def main(
        x: R.Tensor(("n", 8), "float32"),
        c: R.Tensor((), "bool"),
        w: R.Tensor((8, 8), "float32"),
        v: R.Tensor((8, 8), "float32"),
    ) -> R.Tensor(("n", 8), "float32"):
        a = R.nn.relu(R.matmul(x, w))
        if c:
            t = R.permute_dims(v)
            y = R.matmul(a, t)
        else:
            y = R.multiply(a, R.const([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], "float32"))
        z = R.matmul(y, w)
        return z


def test_branches_at_run_time_are_kept_in_a_function():
    w, v, x = random(8, 8), random(8, 8, seed=1), random(3, 8)
    model = load(Branching, params={"w": w, "v": v})
    assert check_canonical(model) == []
    assert model.notes == ("'y' branches at run time, and what stands in the branches stays dense",)
    a = np.maximum(x @ w, 0)
    for condition, y in ((True, a @ v.T), (False, a * np.arange(1, 9, dtype=np.float32))):
        assert_close(run_model(model, x, np.array(condition))[0], y @ w)


def test_layers_in_branches_are_listed_as_refused():
    model = load(Branching, params={"w": random(8, 8), "v": random(8, 8, seed=1)})
    refusals = {fused.site.name: fused.site.refusal for fused in collect_weights(model)}
    assert refusals == {
        "w": "",
        "v": "it stands in a branch that is taken at run time; kernels replace layers of 'main' "
        "itself only",
        "w#2": "",
    }


def test_a_branch_that_reads_a_size():
    @I.ir_module
    class Sized:
        @R.function
        def main(x: R.Tensor(("n", 4), "float32"), c: R.Tensor((), "bool")) -> R.Tensor(
            ("n",), "float32"
        ):
            n = T.int64()
            if c:
                y = R.zeros(R.shape([n]), "float32")
            else:
                y = R.ones(R.shape([n]), "float32")
            z = R.add(y, R.sum(x, axis=[1]))
            return z

    model = load(Sized)
    for condition in (True, False):
        got = run_model(model, np.zeros((3, 4), np.float32), np.array(condition))[0]
        np.testing.assert_array_equal(got, np.full(3, 0.0 if condition else 1.0, np.float32))


def test_side_effects_are_refused():
    @I.ir_module
    class Impure:
        @R.function(pure=False)
        def main(x: R.Tensor((4,), "float32")) -> R.Tensor((4,), "float32"):
            _ = R.print(x, format="{}")
            return x

    with pytest.raises(ModelError, match="side effects"):
        load(Impure)
