"""Dense layers without a schedule, and with the schedules that MetaSchedule finds for them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import tvm
import tvm_ffi
from dense_support import machine, target_of
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_reference import ACC, EPILOGUES, node, operands, reference, scalar, weight_for
from panel_support import BuiltKernel, batch_of, build_kernel
from tvm import tirx
from tvm.s_tir import Schedule
from tvm_sparse.schedules.base import matrix_view
from tvm_sparse.schedules.epilogue import EMITTERS
from tvm_sparse.schedules.lookup import template_named
from tvm_sparse.schedules.x86.metaschedule import (
    METASCHEDULE,
    build_metaschedule,
    trace_text,
    unscheduled,
)

from tvm_sparse.check import compare
from tvm_sparse.errors import PlanError
from tvm_sparse.formats import FORMATS
from tvm_sparse.planner import check_config
from tvm_sparse.tuning import metaschedule as search
from tvm_sparse.tuning.metaschedule import search_dense
from tvm_sparse.workload import (
    Conv2dGeometry,
    Epilogue,
    EpilogueOp,
    EpilogueRef,
    MatmulGeometry,
    Workload,
)

LANES = 8
SIZES = st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 31])

# Every operation, polynomials of polynomials among them, and values that are used twice.
EVERY_OPERATION = Epilogue(
    (
        EpilogueOp("add", (ACC, EpilogueRef("channel", 0))),
        EpilogueOp("tanh", (node(0),)),
        EpilogueOp("gelu", (node(1),)),
        EpilogueOp("multiply", (node(2), node(1))),
        EpilogueOp("sigmoid", (node(3),)),
        EpilogueOp("exp", (node(4),)),
        EpilogueOp("erf", (node(5),)),
        EpilogueOp("silu", (node(6),)),
        EpilogueOp("gelu_tanh", (node(7),)),
        EpilogueOp("abs", (node(8),)),
        EpilogueOp("add", (node(9), scalar(1.0))),
        EpilogueOp("sqrt", (node(10),)),
        EpilogueOp("divide", (EpilogueRef("tensor", 0), node(11))),
        EpilogueOp("subtract", (node(12), node(0))),
        EpilogueOp("negative", (node(13),)),
        EpilogueOp("minimum", (node(14), scalar(0.5))),
        EpilogueOp("maximum", (node(15), EpilogueRef("tensor", 1))),
    ),
    channels=1,
    tensors=2,
)
# Twice as long at every step, if a value was written again wherever it is used.
DOUBLING = Epilogue(
    tuple(EpilogueOp("add", (ref, ref)) for ref in [ACC, *(node(i) for i in range(30))])
)

CONVOLUTIONS = [
    Conv2dGeometry(2, 5, 9, 11, 17, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2)),
    Conv2dGeometry(1, 3, 13, 13, 16, (7, 7), (2, 2), (3, 3, 3, 3)),
    Conv2dGeometry(1, 6, 7, 7, 9, (1, 1)),
    Conv2dGeometry(1, 4, 8, 9, 3, (3, 3), padding=(1, 1, 1, 1)),
    Conv2dGeometry(1, 6, 7, 9, 20, (3, 3), padding=(1, 1, 1, 1), groups=2),
    Conv2dGeometry(2, 6, 9, 8, 6, (3, 3), (2, 2), (1, 1, 1, 1), groups=6),
    Conv2dGeometry(1, 4, 6, 6, 8, (3, 3), groups=4),
]


def matmul(m, k, n, epilogue="none", **more):
    return Workload("matmul", MatmulGeometry(m, k, n), epilogue=EPILOGUES[epilogue], **more)


def conv2d(geometry, epilogue="none", **more):
    return Workload("conv2d", geometry, epilogue=EPILOGUES[epilogue], **more)


def compiled(workload, function, weight):
    """Compile a function of the template's arguments, and lay the weight out for it."""
    packed = FORMATS["plain"].pack(matrix_view(weight, workload.op), {})
    named = function.with_attr("global_symbol", "kernel")
    kernel = tvm.compile(named, target_of(LANES))["kernel"]
    return BuiltKernel(kernel, METASCHEDULE.arguments(workload, packed))


def check(workload, function, seed=0, spoil=None):
    """Run a function on random operands and compare with float64."""
    weight = weight_for(workload.geometry, 1.0, seed)
    x, channels, tensors, shape = operands(workload, batch_of(workload), seed)
    if spoil is not None:
        x.flat[:: max(1, x.size // 3)] = spoil
    got = compiled(workload, function, weight).run(x, channels, tensors, shape)
    want, bound = reference(workload, weight, x, channels, tensors)
    result = compare("kernel", got, want, bound)
    assert result.ok, result


@settings(max_examples=8)
@given(m=SIZES, k=SIZES, n=SIZES, epilogue=st.sampled_from(list(EPILOGUES)), seed=st.integers(0, 9))
def test_a_matmul_without_a_schedule_agrees_with_float64(m, k, n, epilogue, seed):
    workload = matmul(m, k, n, epilogue)
    check(workload, unscheduled(workload), seed)


@pytest.mark.parametrize("epilogue", ["none", "bias+residual+relu"])
@pytest.mark.parametrize("geometry", CONVOLUTIONS)
def test_a_convolution_without_a_schedule_agrees_with_float64(geometry, epilogue):
    workload = conv2d(geometry, epilogue)
    check(workload, unscheduled(workload))


def test_every_operation_of_an_epilogue_agrees_with_float64():
    assert {op.name for op in EVERY_OPERATION.ops} == set(EMITTERS)
    for workload in (matmul(9, 12, 5), conv2d(CONVOLUTIONS[0])):
        workload = replace(workload, epilogue=EVERY_OPERATION)
        check(workload, unscheduled(workload))


def test_values_that_are_used_twice_do_not_double_the_code():
    workload = replace(matmul(5, 6, 7), epilogue=DOUBLING)
    check(workload, unscheduled(workload))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["maximum", "minimum"])
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_nan_and_inf_pass_an_epilogue(name, value):
    epilogue = Epilogue((EpilogueOp(name, (ACC, scalar(0.0))),))
    workload = replace(matmul(9, 12, 5), epilogue=epilogue)
    check(workload, unscheduled(workload), spoil=value)


@pytest.fixture(scope="module")
def small_conv2d():
    geometry = Conv2dGeometry(1, 4, 8, 8, 16, (3, 3), padding=(1, 1, 1, 1))
    return conv2d(geometry, "bias+residual+relu")


@pytest.fixture(scope="module")
def found(small_conv2d, tmp_path_factory):
    """Search with 4 trials, once for the tests of this file."""
    seen, folder = [], tmp_path_factory.mktemp("log")
    schedule = search_dense(
        small_conv2d,
        target_of(LANES),
        machine(LANES),
        4,
        on_trials=lambda count, best: seen.append((count, best)),
        work_dir=folder,
    )
    assert schedule is not None
    assert [count for count, _ in seen] == [1, 2, 3, 4]
    assert (schedule.trials, schedule.us) == (4, seen[-1][1])
    assert [path.name for path in folder.iterdir()] == ["metaschedule.log"]
    return schedule


def test_a_trace_that_was_found_builds_and_agrees_with_float64(small_conv2d, found):
    template, config = template_named("metaschedule"), {"trace": found.trace}
    check_config("layer", template, small_conv2d, machine(LANES), config)
    weight = weight_for(small_conv2d.geometry, 1.0, 0)
    kernel = build_kernel(template, small_conv2d, weight, LANES, config)
    x, channels, tensors, shape = operands(small_conv2d, 1, 0)
    want, bound = reference(small_conv2d, weight, x, channels, tensors)
    assert compare("found", kernel.run(x, channels, tensors, shape), want, bound).ok


def test_a_trace_holds_what_the_postprocessors_did(small_conv2d, found):
    steps, _ = json.loads(found.trace)
    assert "EnterPostproc" in [step[0] for step in steps]
    function = build_metaschedule(small_conv2d, machine(LANES), None, {"trace": found.trace})
    # What rules leave for postprocessors to do is written as annotations.
    for left in ("parallel", "vectorize", "unroll_explicit", "unroll_implicit"):
        assert f"meta_schedule.{left}" not in function.script()
    assert "T.parallel" not in function.script()


@pytest.mark.parametrize(
    "other",
    [
        matmul(16, 36, 64),
        conv2d(Conv2dGeometry(1, 4, 8, 8, 24, (3, 3), padding=(1, 1, 1, 1)), "bias+residual+relu"),
        conv2d(Conv2dGeometry(1, 12, 8, 8, 16, (3, 3), padding=(1, 1, 1, 1)), "bias+residual+relu"),
    ],
    ids=["operator", "outputs", "inputs"],
)
def test_a_trace_of_another_layer_is_refused_in_a_sentence(found, other):
    with pytest.raises(ValueError, match=r"^the trace (does not apply|was found for)[^\n]*$"):
        build_metaschedule(other, machine(LANES), None, {"trace": found.trace})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", "[[],[]", "[1, 2]", '[["x"], []]', '[[], [["a", 1]]]']
)
def test_a_damaged_trace_is_refused_in_a_sentence(text):
    with pytest.raises(ValueError, match="the trace does not apply to this layer"):
        build_metaschedule(matmul(8, 8, 8), machine(LANES), None, {"trace": text})


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_parallel_loops_have_one_piece_a_thread(threads):
    workload = matmul(17, 23, 35, "bias", threads=threads)
    schedule = Schedule(unscheduled(workload))
    for block in ("product", "y"):
        schedule.parallel(schedule.get_loops(schedule.get_sblock(block))[0])
    function = build_metaschedule(workload, machine(LANES), None, {"trace": trace_text(schedule)})
    pieces = []

    def note(loop):
        if int(loop.kind) == tirx.ForKind.PARALLEL:
            pieces.append(int(loop.extent))

    tvm_ffi.structural_walk(function.body, (tirx.For, note))
    assert pieces == {1: [], 64: [35, 35]}.get(threads, [threads, threads])
    check(workload, function)


def test_a_search_says_nothing_and_leaves_no_files(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    # Without XGBoost, candidates are drawn by chance.
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
    assert search_dense(matmul(16, 16, 4, "bias+gelu"), target_of(LANES), machine(LANES), 2)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_a_search_can_be_interrupted():
    def interrupt(count, best):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_dense(matmul(16, 16, 4), target_of(LANES), machine(LANES), 2, on_trials=interrupt)


def test_nothing_is_searched_in_no_trials():
    assert search_dense(matmul(16, 16, 4), target_of(LANES), machine(LANES), 0) is None


@pytest.mark.parametrize(
    ("workload", "words"),
    [
        (matmul(8, 8, None), "known number of tokens"),
        (conv2d(Conv2dGeometry(None, 8, 9, 9, 8, (3, 3))), "known number of images"),
        (Workload("matmul", MatmulGeometry(8, 8, 9, "panels")), "not in panels"),
        (Workload("softmax", None), "only for matrix products and convolutions"),
    ],
)
def test_what_has_no_schedule_is_refused_in_words(workload, words):
    match = METASCHEDULE.supports(workload, machine(LANES))
    assert not match
    assert words in match.reason
    with pytest.raises(ValueError, match=words):
        unscheduled(workload)


def test_it_is_never_planned_without_a_record():
    workload = matmul(8, 8, 8)
    assert not METASCHEDULE.space(workload, machine(LANES))
    assert METASCHEDULE.estimate(workload, machine(LANES), None, {"trace": "[]"}) == math.inf
    for config in ({}, {"trace": 1}, {"trace": "[]", "threads": 2}):
        with pytest.raises(PlanError, match="'layer': the configuration of 'metaschedule'"):
            check_config("layer", METASCHEDULE, workload, machine(LANES), config)
