"""The book of records: times only of exactly this layer, hints of the layer most like it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_sparse.schedules.base import KernelTemplate
from tvm_sparse.schedules.lookup import template_named
from tvm_sparse.schedules.x86.gemv import MAX_TOKENS
from tvm_sparse.schedules.x86.templates import TEMPLATES

from tvm_sparse.errors import PlanError
from tvm_sparse.ops import WeightSite
from tvm_sparse.planner import HINT_MARGIN, Decision, Plan, decide
from tvm_sparse.profile import SparsityProfile, profile_weight
from tvm_sparse.records import RecordFile, Statistics, Subject, TuningRecord, code_digest
from tvm_sparse.targets import X86Machine, machine_of, resolve_target
from tvm_sparse.tuning.book import Hint, RecordBook, describe_geometry, history_of
from tvm_sparse.workload import (
    Conv2dGeometry,
    Epilogue,
    EpilogueOp,
    EpilogueRef,
    Geometry,
    MatmulGeometry,
    Workload,
)

TARGET = {"kind": "llvm", "mcpu": "x86-64-v4"}
HERE, TVM, DIGEST = "this machine, 8 cores", "0.27.0", "d1" * 12
MATMUL = MatmulGeometry(768, 768, 128)
CONV = Conv2dGeometry(1, 64, 28, 28, 64, (3, 3), padding=(1, 1, 1, 1))
RELU = Epilogue((EpilogueOp("maximum", (EpilogueRef("acc"), EpilogueRef("scalar", value=0.0))),))


def workload_of(geometry: Geometry, **changes: Any) -> Workload:
    op = "conv2d" if isinstance(geometry, Conv2dGeometry) else "matmul"
    return replace(Workload(op, geometry), **changes)


@cache
def profile_of(geometry: Geometry, density: float) -> SparsityProfile:
    weight = np.random.default_rng(0).random(geometry.weight_shape) < density
    return profile_weight(weight.astype(np.float32))


def statistics_of(geometry: Geometry, density: float = 0.1, **changes: Any) -> Statistics:
    rows, columns = geometry.weight_shape
    return replace(Statistics(rows, columns, density, 0.3, 0.3, "unstructured"), **changes)


def subject_of(geometry: Geometry = MATMUL, density: float = 0.1, **changes: Any) -> Subject:
    subject = Subject(
        workload_of(geometry),
        (DIGEST,),
        statistics_of(geometry, density),
        TARGET,
        HERE,
        code_digest(),
        TVM,
    )
    return replace(subject, **changes)


@cache
def machine() -> X86Machine:
    return machine_of(resolve_target("x86-64-v4"), 1)


def usual(kernel: str, geometry: Geometry = MATMUL, number: int = 0) -> dict[str, Any]:
    return dict(template_named(kernel).space(workload_of(geometry), machine())[number])


def record_of(
    us: float | None, kernel: str = "register_tile", subject: Subject | None = None, **changes: Any
) -> TuningRecord:
    record = TuningRecord(subject or subject_of(), kernel, usual(kernel), "ok", us, trial=1)
    return replace(record, **changes)


def book_of(records: Iterable[TuningRecord], machine: str | None = HERE) -> RecordBook:
    return RecordBook(RecordFile(tuple(records)), TARGET, machine, TVM)


def measured(records: Iterable[TuningRecord], **book: Any) -> list[float | None]:
    found = book_of(records, **book).measured(workload_of(MATMUL), DIGEST)
    return [record.us for record in found]


# What was measured of exactly this layer.


def test_records_of_this_layer_are_found() -> None:
    records = [record_of(50.0), record_of(80.0, "dense_panels")]
    assert measured(records) == [50.0, 80.0]
    assert measured([]) == []


OTHERS: dict[str, Subject] = {
    "weight": subject_of(weights=("e2" * 12,)),
    "shape": subject_of(replace(MATMUL, k=512)),
    "number of tokens": subject_of(replace(MATMUL, n=None)),
    "epilogue": subject_of(workload=workload_of(MATMUL, epilogue=RELU)),
    "number of threads": subject_of(workload=workload_of(MATMUL, threads=2)),
    "type": subject_of(workload=workload_of(MATMUL, dtype="float16")),
    "target": subject_of(target={**TARGET, "mcpu": "x86-64-v3"}),
    "features of the target": subject_of(target={**TARGET, "mattr": ["-avx512f"]}),
    "machine": subject_of(machine="another machine, 2 cores"),
    "fleet": subject_of(machine="fleet:pool"),
    "kernels' code": subject_of(code="c0de" * 6),
    "TVM": subject_of(tvm="0.28.0"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_times_of_another_one_are_not_this_layers(what: str) -> None:
    assert measured([record_of(50.0, subject=OTHERS[what]), record_of(90.0)]) == [90.0]
    assert measured([record_of(50.0, subject=OTHERS[what])]) == []


def test_a_layer_that_was_measured_together_with_others_is_found_by_its_own_weight() -> None:
    together = subject_of(weights=("e2" * 12, DIGEST, "f3" * 12))
    assert measured([record_of(50.0, subject=together)]) == [50.0]


def test_where_the_machine_is_another_one_any_machine_of_the_target_will_do() -> None:
    records = [
        record_of(50.0, subject=OTHERS["machine"]),
        record_of(60.0, subject=OTHERS["target"]),
        record_of(70.0, subject=OTHERS["kernels' code"]),
        record_of(80.0, subject=OTHERS["TVM"]),
    ]
    assert measured(records, machine=None) == [50.0]


def test_the_order_of_the_targets_entries_does_not_matter() -> None:
    target = dict(reversed(TARGET.items()))
    assert measured([record_of(50.0, subject=subject_of(target=target))]) == [50.0]


def test_what_was_measured_again_counts_as_it_was_the_last_time() -> None:
    again = [record_of(50.0), record_of(40.0, "gemv"), record_of(70.0)]
    assert measured(again) == [40.0, 70.0]
    other = replace(record_of(60.0), config=usual("register_tile", number=1))
    assert measured([record_of(50.0), other, record_of(70.0)]) == [60.0, 70.0]


@pytest.mark.parametrize("status", ["wrong", "failed", "crashed", "timed out"])
def test_what_failed_has_no_time(status: str) -> None:
    failed = record_of(None, status=status)
    assert measured([failed]) == []
    assert measured([record_of(50.0), failed]) == []
    assert measured([failed, record_of(50.0)]) == [50.0]
    # A time that a failure brings along is none either.
    assert measured([record_of(1.0, status=status)]) == []


# Layers that are alike.


def similar(
    records: Iterable[TuningRecord],
    geometry: Geometry = MATMUL,
    density: float = 0.1,
    **workload: Any,
) -> list[Hint]:
    statistics = statistics_of(geometry, density)
    return book_of(records).similar(workload_of(geometry, **workload), statistics)


def test_a_similar_layers_hint_is_its_fastest_kernel() -> None:
    records = [record_of(50.0), record_of(30.0, "dense_panels"), record_of(None, "sliced_rows")]
    (hint,) = similar(records, density=0.12)
    assert (hint.record.kernel, hint.record.us, hint.trusted) == ("dense_panels", 30.0, True)


def test_a_layer_of_the_same_shape_and_zeros_is_at_no_distance() -> None:
    (hint,) = similar([record_of(50.0)])
    assert hint.distance == 0.0


def test_a_layer_of_which_all_failed_gives_no_hint() -> None:
    assert similar([record_of(None, status="crashed")]) == []


def test_the_same_shape_at_another_density_is_nearer_than_another_shape() -> None:
    denser = record_of(50.0, subject=subject_of(density=0.12))
    larger = record_of(50.0, subject=subject_of(replace(MATMUL, m=1024)))
    hints = similar([larger, denser])
    assert [hint.record for hint in hints] == [denser, larger]
    assert hints[0].distance < hints[1].distance


def test_trusted_hints_come_first_and_then_the_nearest() -> None:
    near = record_of(50.0, subject=subject_of(density=0.11))
    far = record_of(50.0, subject=subject_of(density=0.15))
    strange = record_of(50.0, subject=subject_of(machine="another machine, 2 cores"))
    old = record_of(50.0, subject=subject_of(density=0.12, code="c0de" * 6))
    hints = similar([old, far, strange, near])
    assert [hint.record for hint in hints] == [near, far, strange, old]
    assert [hint.trusted for hint in hints] == [True, True, False, False]


def test_the_spread_of_the_nonzeros_counts() -> None:
    even = record_of(50.0)
    uneven = record_of(50.0, subject=subject_of(statistics=statistics_of(MATMUL, row_cv=0.9)))
    assert [hint.record for hint in similar([uneven, even])] == [even, uneven]
    wild = record_of(50.0, subject=subject_of(statistics=statistics_of(MATMUL, row_cv=2.0)))
    assert similar([wild]) == []


FAR: dict[str, Geometry] = {
    "three times as wide": replace(MATMUL, k=3 * 768),
    "a tenth of the rows": replace(MATMUL, m=77),
    "one token": replace(MATMUL, n=1),
    "any number of tokens": replace(MATMUL, n=None),
    "activations in panels": replace(MATMUL, layout="panels"),
    "an operator of another kind": Conv2dGeometry(1, 768, 8, 16, 768, (1, 1)),
}


@pytest.mark.parametrize("what", FAR)
def test_a_layer_that_is_too_far_away_tells_nothing(what: str) -> None:
    assert similar([record_of(50.0, subject=subject_of(FAR[what]))]) == []
    assert similar([record_of(50.0)], FAR[what]) == []


@pytest.mark.parametrize("density", [0.01, 0.04, 0.3, 1.0])
def test_a_layer_of_quite_another_density_tells_nothing(density: float) -> None:
    assert similar([record_of(50.0)], density=density) == []


def test_other_threads_and_types_tell_nothing() -> None:
    assert similar([record_of(50.0)], threads=2) == []
    assert similar([record_of(50.0)], dtype="float16") == []


def test_another_epilogue_tells_as_much() -> None:
    (hint,) = similar([record_of(50.0)], epilogue=RELU)
    assert hint.distance == 0.0


OTHER_CONVOLUTIONS: dict[str, Geometry] = {
    "kernel": replace(CONV, kernel=(1, 1)),
    "strides": replace(CONV, strides=(2, 2)),
    "dilation": replace(CONV, dilation=(2, 2)),
    "groups": replace(CONV, groups=2),
    "batch": replace(CONV, batch=None),
}


@pytest.mark.parametrize("what", OTHER_CONVOLUTIONS)
def test_a_convolution_with_another_value_tells_nothing(what: str) -> None:
    other = record_of(50.0, subject=subject_of(OTHER_CONVOLUTIONS[what]))
    assert similar([other], CONV) == []
    same = record_of(50.0, subject=subject_of(CONV))
    assert len(similar([same], CONV)) == 1
    assert len(similar([same], replace(CONV, out_channels=72, in_height=26))) == 1


def test_depthwise_convolutions_of_other_channels_are_alike() -> None:
    wide, narrow = (Conv2dGeometry(1, c, 28, 28, c, (3, 3), groups=c) for c in (96, 80))
    assert len(similar([record_of(50.0, subject=subject_of(wide))], narrow)) == 1


shapes = st.builds(MatmulGeometry, st.integers(1, 99), st.integers(1, 99), st.integers(1, 99))


@settings(max_examples=30)
@given(one=shapes, other=shapes, densities=st.tuples(*[st.floats(0, 1)] * 2))
def test_likeness_is_mutual(
    one: MatmulGeometry, other: MatmulGeometry, densities: tuple[float, float]
) -> None:
    ours, theirs = densities
    there = similar([record_of(9.0, subject=subject_of(one, ours))], other, theirs)
    back = similar([record_of(9.0, subject=subject_of(other, theirs))], one, ours)
    assert [h.distance for h in there] == pytest.approx([h.distance for h in back])
    assert all(0 <= hint.distance < math.inf for hint in there)


def test_a_hint_names_the_layer_and_says_when_it_is_from_elsewhere() -> None:
    (hint,) = similar([record_of(50.0)])
    assert hint.describe() == "768x768x128 with 90 % zeros"
    (hint,) = similar([record_of(50.0, subject=OTHERS["machine"])])
    assert hint.describe() == (
        "768x768x128 with 90 % zeros, on another machine or by an older version"
    )


# Histories and shapes.


def trials_of(times: Iterable[float | None]) -> list[TuningRecord]:
    return [record_of(us, trial=trial) for trial, us in enumerate(times, 1)]


def test_a_history_is_the_fastest_so_far_after_every_trial_that_has_one() -> None:
    records = trials_of([None, 90.0, 95.0, None, 80.0])
    points = ((2, 90.0), (3, 90.0), (4, 90.0), (5, 80.0))
    assert history_of(records) == points
    assert history_of(records[::-1]) == points
    assert history_of(trials_of([None])) == history_of([]) == ()


@settings(max_examples=30)
@given(times=st.lists(st.none() | st.floats(0.01, 1e6)))
def test_a_history_never_gets_slower(times: list[float | None]) -> None:
    history = history_of(trials_of(times))
    assert [trial for trial, _ in history] == sorted({trial for trial, _ in history})
    best = [us for _, us in history]
    assert best == sorted(best, reverse=True)
    known = [us for us in times if us is not None]
    assert (best[-1] if best else None) == (round(min(known), 3) if known else None)


@pytest.mark.parametrize(
    ("geometry", "text"),
    [
        (MatmulGeometry(5, 7, 3), "5x7x3"),
        (MatmulGeometry(5, 7, None), "5x7xn"),
        (CONV, "3x3 64->64@28x28"),
        (replace(CONV, strides=(2, 2)), "3x3/2 64->64@28x28"),
        (replace(CONV, batch=4), "3x3 64->64@28x28 b4"),
        (replace(CONV, batch=None), "3x3 64->64@28x28 bn"),
        (replace(CONV, groups=4), "3x3 64->64@28x28 in 4 groups"),
    ],
)
def test_a_shape_takes_a_few_characters(geometry: Geometry, text: str) -> None:
    assert describe_geometry(geometry) == text


# Plans with records.


def decided(
    records: Iterable[TuningRecord] | None,
    geometry: Geometry = MATMUL,
    density: float = 0.1,
    refusal: str = "",
    **options: Any,
) -> Decision:
    workload = workload_of(geometry)
    site = WeightSite("fc", "w", "y", workload, geometry.weight_shape, refusal)
    book = None if records is None else book_of(records)
    profile = profile_of(geometry, density)
    return decide(site, profile, machine(), book=book, digest=DIGEST, **options)


def test_without_records_of_it_a_layer_is_planned_by_the_model() -> None:
    assert decided([]) == decided(None)
    assert decided([]).source == "model"
    assert decided([record_of(1.0, subject=OTHERS["number of threads"])]) == decided(None)


@pytest.mark.parametrize("kernel", ["register_tile", "sliced_rows"])
def test_the_measured_winner_is_taken_and_its_times_are_given(kernel: str) -> None:
    config = usual(kernel, number=1)
    records = [
        record_of(900.0, kernel),
        record_of(100.0, kernel, config=config),
        record_of(250.0, "dense_panels"),
        record_of(500.0, "dense_panels", config=usual("dense_panels", number=1)),
    ]
    decision = decided(records)
    assert (decision.source, decision.kernel, decision.config) == ("record", kernel, config)
    assert decision.reason == "measured 2.5x faster (100 us sparse, 250 us dense)"
    assert (decision.expected_us, decision.dense_us) == (100.0, 250.0)
    assert [candidate.expected_us for candidate in decision.candidates] == [100.0, 250.0]


def test_dense_wins_where_it_was_measured_faster_whatever_the_estimates() -> None:
    assert decided(None, density=0.02).is_sparse
    records = [record_of(100.0), record_of(99.0, "dense_panels")]
    decision = decided(records, density=0.02)
    assert (decision.source, decision.kernel) == ("record", "dense_panels")
    assert decision.reason == ("98 % zeros do not pay here (measured 100 us sparse, 99 us dense)")


def test_sparse_wins_by_a_hair_where_that_was_measured() -> None:
    assert not decided(None, density=0.7).is_sparse
    decision = decided([record_of(99.0), record_of(100.0, "dense_panels")], density=0.7)
    assert (decision.source, decision.kernel) == ("record", "register_tile")


def test_a_layer_of_which_no_dense_kernel_was_measured_gets_the_sparse_one() -> None:
    decision = decided([record_of(100.0)])
    assert (decision.source, decision.kernel) == ("record", "register_tile")
    assert decision.dense_us is None


def test_a_layer_of_which_no_sparse_kernel_was_measured_stays_dense() -> None:
    decision = decided([record_of(100.0, "dense_panels")])
    assert (decision.source, decision.kernel) == ("record", "dense_panels")
    assert (decision.expected_us, decision.dense_us) == (100.0, 100.0)


def test_the_reason_of_a_layer_that_stays_dense_is_not_another_dense_kernels_refusal() -> None:
    decision = decided([record_of(100.0, "dense_panels")])
    assert decision.reason == "no sparse kernel was measured"


def test_a_kernel_that_takes_next_to_no_time_can_be_planned() -> None:
    assert decided([record_of(0.003), record_of(50.0, "dense_panels")]).is_sparse


def test_a_forced_format_takes_its_measured_kernel() -> None:
    config = usual("sliced_rows", number=1)
    records = [record_of(50.0), record_of(300.0, "sliced_rows", config=config)]
    decision = decided(records, force={"fc": "sliced_ell"})
    assert (decision.source, decision.kernel, decision.config) == ("user", "sliced_rows", config)
    assert decision.expected_us == 300.0


@pytest.mark.parametrize("wanted", ["sliced_ell", "dense"])
def test_a_forced_format_that_was_not_measured_is_planned_by_the_model(wanted: str) -> None:
    decision = decided([record_of(50.0)], force={"*": wanted})
    assert decision == decided(None, force={"*": wanted})
    assert (decision.source, decision.format) == ("user", wanted)


def test_a_format_that_does_not_exist_is_refused_beside_records_too() -> None:
    with pytest.raises(PlanError, match="'fc' cannot be csr: there is no format 'csr'"):
        decided([record_of(50.0)], force={"fc": "csr"})


@pytest.mark.parametrize("dense", [[], [record_of(900.0, "dense_panels")]])
def test_a_layer_that_the_user_keeps_dense_is_dense_whatever_was_measured(
    dense: list[TuningRecord],
) -> None:
    decision = decided([record_of(1.0), *dense], forbid=["f*"])
    assert not decision.is_sparse
    assert (decision.source, decision.reason) == ("user", "kept dense by the user")
    assert decision.expected_us == (900.0 if dense else decided(None).dense_us)


def test_an_operator_that_no_kernel_takes_is_left_alone_beside_records_too() -> None:
    decision = decided([record_of(50.0)], refusal="the weight is float16")
    assert (decision.kernel, decision.reason) == ("tvm", "the weight is float16")


# Hints in plans.


@pytest.mark.parametrize("kernel", ["register_tile", "sliced_rows", "dense_panels"])
def test_a_layer_that_was_not_measured_takes_what_the_similar_one_got(kernel: str) -> None:
    config = usual(kernel, number=2)
    like = subject_of(weights=("e2" * 12,), density=0.11)
    records = [
        record_of(50.0, kernel, like, config=config),
        record_of(60.0, "gemv" if kernel == "dense_panels" else "dense_panels", like),
    ]
    decision = decided(records)
    assert (decision.source, decision.kernel, decision.config) == ("record", kernel, config)
    assert decision.reason == "as was fastest for 768x768x128 with 89 % zeros"
    # The time is estimated for this layer, not taken over from that one.
    template = template_named(kernel)
    estimate = template.estimate(workload_of(MATMUL), machine(), profile_of(MATMUL, 0.1), config)
    assert decision.expected_us == round(estimate, 2)
    assert decision.dense_us == decided(None).dense_us
    assert decision.candidates == decided(None).candidates


def slow_config() -> dict[str, Any]:
    """Return a configuration that the model expects to be far behind its own choice."""
    profile, template = profile_of(MATMUL, 0.1), template_named("register_tile")
    config = {**usual("register_tile"), "mr": 1, "nt": 1, "kb": 16, "multiple": 16}
    estimate = template.estimate(workload_of(MATMUL), machine(), profile, config)
    assert estimate > HINT_MARGIN * (decided(None).expected_us or math.inf)
    return config


def test_a_hint_from_elsewhere_counts_only_where_the_estimate_agrees() -> None:
    best = decided(None)
    elsewhere = subject_of(weights=("e2" * 12,), machine="another machine, 2 cores")
    agreed = decided([record_of(50.0, best.kernel, elsewhere, config=best.config)])
    assert agreed.source == "record"
    assert agreed.reason.endswith("90 % zeros, on another machine or by an older version")
    slow = record_of(50.0, "register_tile", elsewhere, config=slow_config())
    assert decided([slow]) == best
    trusted = replace(slow, subject=subject_of(weights=("e2" * 12,)))
    assert decided([trusted]).config == slow_config()


@pytest.mark.parametrize("kind", ["force", "forbid"])
def test_what_the_user_wants_stands_above_hints(kind: str) -> None:
    like = record_of(50.0, subject=subject_of(weights=("e2" * 12,)))
    options: dict[str, Any] = {"force": {"fc": "dense"}} if kind == "force" else {"forbid": ["fc"]}
    assert decided([like], **options) == decided(None, **options)


UNBUILDABLE: dict[str, dict[str, Any]] = {
    "a height that is text": {"mr": "six"},
    "no rows": {"mr": 0},
    "blocks that end inside a vector": {"kb": 33},
    "a key that there is not": {"unroll": 4},
    "far too many accumulators": {"mr": 100, "nt": 100},
}


@pytest.mark.parametrize("what", UNBUILDABLE)
@pytest.mark.parametrize("digest", [DIGEST, "e2" * 12], ids=["its own", "a similar layer's"])
def test_a_record_whose_configuration_cannot_be_built_is_passed_over(
    what: str, digest: str
) -> None:
    subject = subject_of(weights=(digest,))
    broken = record_of(1.0, subject=subject, config={**usual("register_tile"), **UNBUILDABLE[what]})
    assert decided([broken]) == decided(None)
    missing = replace(broken, config={"mr": 4})
    assert decided([missing]) == decided(None)


def test_a_record_whose_configuration_the_format_cannot_pack_is_passed_over() -> None:
    nine_rows = {**usual("register_tile"), "mr": 9, "nt": 2, "multiple": 144}
    assert decided([record_of(1.0, config=nine_rows)]) == decided(None)


@pytest.mark.parametrize("digest", [DIGEST, "e2" * 12], ids=["its own", "a similar layer's"])
def test_a_record_of_a_kernel_that_is_no_more_is_passed_over(digest: str) -> None:
    gone = replace(record_of(1.0, subject=subject_of(weights=(digest,))), kernel="gone")
    assert decided([gone]) == decided(None)


def test_a_full_weight_stays_dense_whatever_a_similar_layer_got() -> None:
    half = Statistics.of(profile_of(MATMUL, 0.55))
    like = record_of(50.0, subject=subject_of(weights=("e2" * 12,), statistics=half))
    assert not decided([like], density=1.0).is_sparse


def test_the_next_fastest_is_taken_where_the_fastest_cannot_be_built() -> None:
    broken = record_of(1.0, config={**usual("register_tile"), "mr": 0})
    decision = decided([broken, record_of(70.0), record_of(50.0, "dense_panels")])
    assert (decision.kernel, decision.expected_us) == ("dense_panels", 50.0)
    assert "measured 70 us sparse, 50 us dense" in decision.reason


def test_a_hint_of_a_kernel_that_does_not_take_the_layer_is_passed_over() -> None:
    few = MatmulGeometry(768, 768, MAX_TOKENS[machine().registers])
    many = MatmulGeometry(768, 768, MAX_TOKENS[machine().registers] + 1)
    like = record_of(1.0, "gemv", subject_of(few), config=usual("gemv", few))
    assert decided([like], many) == decided(None, many)


def test_the_next_hint_is_taken_where_the_first_cannot_be_built() -> None:
    nearest = subject_of(weights=("e2" * 12,))
    next_one = subject_of(weights=("f3" * 12,), density=0.13)
    broken = record_of(1.0, subject=nearest, config={"mr": 0})
    config = usual("sliced_rows", number=1)
    sound = record_of(50.0, "sliced_rows", next_one, config=config)
    decision = decided([broken, sound])
    assert (decision.kernel, decision.config) == ("sliced_rows", config)
    assert decision.reason == "as was fastest for 768x768x128 with 87 % zeros"


@pytest.mark.parametrize("subject", [subject_of(), subject_of(weights=("e2" * 12,))])
def test_a_plan_by_records_goes_to_json_and_comes_back_equal(subject: Subject) -> None:
    records = [record_of(50.0, subject=subject), record_of(80.0, "dense_panels", subject)]
    decision = decided(records)
    assert decision.source == "record"
    plan = Plan(TARGET, 1, "0123456789abcdef", (decision,))
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_a_measured_kernel_of_every_template_can_be_planned(template: KernelTemplate) -> None:
    depthwise = Conv2dGeometry(1, 16, 14, 14, 16, (3, 3), groups=16)
    geometry = depthwise if template.name == "depthwise" else MatmulGeometry(40, 64, 2)
    if not template.space(workload_of(geometry), machine()):
        pytest.skip("its configurations come from elsewhere")
    config = dict(template.space(workload_of(geometry), machine())[-1])
    subject = subject_of(geometry)
    decision = decided([record_of(5.0, template.name, subject, config=config)], geometry)
    assert (decision.source, decision.kernel) == ("record", template.name)
    assert (decision.config, decision.expected_us) == (config, 5.0)
