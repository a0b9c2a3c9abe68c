"""The search: what comes first, what is left out, when it ends, and how good what it finds is."""

from __future__ import annotations

import itertools
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_sparse.tuning import search as search_module
from tvm_sparse.tuning.measurer import Candidate, Outcome
from tvm_sparse.tuning.search import CUT, PATIENCE, WALK, Ranked, Search

SPARSE, SLICED, DENSE, GEMV = "register_tile", "sliced_rows", "dense_panels", "gemv"


def entry(kernel: str, number: int, estimate: float) -> Ranked:
    return Ranked(Candidate(kernel, {"mr": number}), estimate)


def ranked(kernels: Mapping[str, Sequence[float]]) -> list[Ranked]:
    """List candidates of some kernels by their estimates."""
    entries = [entry(k, i, us) for k, times in kernels.items() for i, us in enumerate(times)]
    return sorted(entries, key=lambda e: e.estimate)


def names(candidates: Sequence[Candidate]) -> list[str]:
    return [f"{c.kernel} {c.config['mr']}" for c in candidates]


def walk(
    search: Search, time: Callable[[Candidate], float | None], batch: int = 1
) -> list[Candidate]:
    """Measure with a function of time until the search is done; return what was measured."""
    seen: list[Candidate] = []
    while not search.done:
        proposed = search.propose(batch)
        assert 1 <= len(proposed) <= batch
        for candidate in proposed:
            us = time(candidate)
            seen.append(candidate)
            search.tell(candidate, Outcome("failed" if us is None else "ok", us))
    assert search.propose(batch) == []
    return seen


def as_estimated(entries: Sequence[Ranked]) -> Callable[[Candidate], float]:
    times = {e.candidate.key: e.estimate for e in entries}
    return lambda candidate: times[candidate.key]


@pytest.fixture(params=[True, False], ids=["optuna", "estimates"])
def optuna(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Let a search have Optuna, or not."""
    if request.param:
        pytest.importorskip("optuna")
    else:
        without_optuna(monkeypatch)
    return bool(request.param)


def without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "_has_optuna", lambda: False)
    monkeypatch.setattr(search_module, "_Tpe", None)


# What comes first.

MIXED = {SPARSE: [10, 11, 12, 13], SLICED: [14, 15], DENSE: [50, 60], GEMV: [90]}


def test_given_candidates_come_first_and_then_the_best_estimate_of_every_kernel() -> None:
    entries = ranked(MIXED)
    given = [entries[3].candidate, Candidate(SPARSE, {"mr": 99})]
    search = Search(entries, given, 64)
    openers = [*names(given), "register_tile 0", "sliced_rows 0", "dense_panels 0", "gemv 0"]
    assert names(search.propose(6)) == openers
    assert names(search.propose(2)) == openers[:2]


def test_a_given_candidate_that_is_the_best_of_its_kernel_comes_once() -> None:
    entries = ranked(MIXED)
    search = Search(entries, [entries[0].candidate, entries[0].candidate], 64)
    assert names(search.propose(3)) == ["register_tile 0", "sliced_rows 0", "dense_panels 0"]


def test_a_dense_kernel_is_measured_though_it_is_expected_far_behind() -> None:
    entries = ranked({SPARSE: [10] * 30, DENSE: [150]})
    assert DENSE in {c.kernel for c in Search(entries, [], 64).propose(2)}


def test_a_kernel_that_makes_no_sense_is_not_measured_at_all() -> None:
    entries = ranked({SPARSE: [10, 11], DENSE: [50], GEMV: [201]})
    assert GEMV not in {c.kernel for c in walk(Search(entries, [], 64), as_estimated(entries))}


def test_a_short_list_is_walked_from_end_to_end_in_the_order_of_the_estimates(
    optuna: bool,
) -> None:
    entries = ranked({SPARSE: np.linspace(10, 15.9, 14).tolist(), DENSE: [10.5, 12.5, 15.5]})
    assert len(entries) <= WALK
    seen = walk(Search(entries, [], 64), as_estimated(entries))
    openers = ["register_tile 0", "dense_panels 0"]
    rest = [name for name in names([e.candidate for e in entries]) if name not in openers]
    assert names(seen) == openers + rest


# What is left out.


def test_what_is_expected_far_behind_the_best_of_its_kind_is_not_measured(optuna: bool) -> None:
    entries = ranked(
        {SPARSE: [10, 15, 10 * CUT + 0.1, 90], DENSE: [12, 12 * CUT - 0.1, 12 * CUT + 0.1]}
    )
    seen = names(walk(Search(entries, [], 64), as_estimated(entries)))
    assert seen == ["register_tile 0", "dense_panels 0", "register_tile 1", "dense_panels 1"]


def test_what_is_expected_far_behind_the_best_measurement_is_not_measured_any_more() -> None:
    entries = ranked({SPARSE: [10, 11, 12, 13, 14]})
    search = Search(entries, [], 64)
    (first,) = search.propose(1)
    search.tell(first, Outcome("ok", 6.0))
    assert names(search.propose(64)) == ["register_tile 1", "register_tile 2"]


def test_beside_its_best_no_dense_candidate_is_measured_where_sparse_ones_are_far_ahead() -> None:
    entries = ranked({SPARSE: [10, 11], DENSE: [50, 51, 52]})
    seen = names(walk(Search(entries, [], 64), as_estimated(entries)))
    assert seen == ["register_tile 0", "dense_panels 0", "register_tile 1"]


def test_without_candidates_there_is_nothing_to_do() -> None:
    search = Search([], [], 64)
    assert search.done
    assert (search.propose(8), search.best, search.best_us) == ([], None, None)


kernels = st.sampled_from([SPARSE, SLICED, DENSE, GEMV])
spaces = st.lists(st.tuples(kernels, st.floats(1, 500)), min_size=1, max_size=60)


@settings(max_examples=60)
@given(
    space=spaces,
    trials=st.integers(1, 30),
    batch=st.integers(1, 9),
    given_ones=st.lists(st.integers(0, 59), max_size=3),
    failing=st.sets(st.integers(0, 59)),
)
def test_nothing_is_proposed_twice_or_without_promise_or_beyond_the_trials(
    space: list[tuple[str, float]],
    trials: int,
    batch: int,
    given_ones: list[int],
    failing: set[int],
) -> None:
    entries = sorted(
        (entry(kernel, i, us) for i, (kernel, us) in enumerate(space)), key=lambda e: e.estimate
    )
    first = [entries[i].candidate for i in given_ones if i < len(entries)]
    search = Search(entries, first, trials)
    times = as_estimated(entries)

    def time(candidate: Candidate) -> float | None:
        return None if candidate.config["mr"] in failing else times(candidate)

    with pytest.MonkeyPatch.context() as patch:
        without_optuna(patch)
        seen = walk(search, time, batch)
    keys = [candidate.key for candidate in seen]
    assert len(set(keys)) == len(keys) <= trials
    estimates = {e.candidate.key: e.estimate for e in entries}
    openers = {c.key for c in first}
    for kernel in {kernel for kernel, _ in space}:
        openers.add(next(e.candidate.key for e in entries if e.candidate.kernel == kernel))
    for key in set(keys) - openers:
        assert estimates[key] <= 2 * entries[0].estimate
    ok = [us for us in map(time, seen) if us is not None]
    assert search.best_us == min(ok, default=None)


# When it ends.


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_trials_bound_what_is_measured(batch: int) -> None:
    entries = ranked({SPARSE: [10 + i / 100 for i in range(100)]})
    times = itertools.count(1000, -20)
    seen = walk(Search(entries, [], 20), lambda candidate: float(next(times)), batch)
    assert len(seen) == 20


def test_where_more_was_measured_before_than_trials_are_wanted_nothing_is_proposed() -> None:
    entries = ranked({SPARSE: [10, 11, 12, 13], SLICED: [10], DENSE: [10], GEMV: [10]})
    search = Search(entries, [], 2)
    for e in entries[3:]:
        search.tell(e.candidate, Outcome("ok", 9.0))
    assert len(search.measured) > search.trials
    assert search.done
    assert search.propose(8) == []


@pytest.mark.parametrize("batch", [1, 8])
def test_trials_in_vain_end_the_search(optuna: bool, batch: int) -> None:
    entries = ranked({SPARSE: [10 + i / 100 for i in range(100)]})
    search = Search(entries, [], 1000)
    seen = walk(search, as_estimated(entries), batch)
    assert 1 + PATIENCE <= len(seen) < 1 + PATIENCE + batch
    assert search.patience_left == 0.0


def test_an_improvement_renews_the_patience() -> None:
    entries = ranked({SPARSE: [10 + i / 100 for i in range(100)]})
    search = Search(entries, [], 1000)
    assert search.patience_left == 1.0
    times = itertools.chain([100.0] * 10, [90.0], itertools.repeat(100.0))
    assert len(walk(search, lambda candidate: next(times))) == 11 + PATIENCE


def test_a_gain_within_the_noise_does_not_renew_the_patience() -> None:
    entries = ranked({SPARSE: [10 + i / 100 for i in range(100)]})
    times = itertools.count(100.0, -0.5)
    assert len(walk(Search(entries, [], 1000), lambda candidate: next(times))) == 1 + PATIENCE


def test_a_candidate_from_elsewhere_does_not_bring_back_what_ended() -> None:
    entries = ranked({SPARSE: [10 + i / 100 for i in range(100)]})
    search = Search(entries, [], 1000)
    walk(search, as_estimated(entries))
    other = Candidate(SLICED, {"mr": 7})
    search.add(other)
    assert not search.done
    assert search.propose(8) == [other]
    search.tell(other, Outcome("ok", 50.0))
    assert search.done


def test_an_added_candidate_comes_next_and_costs_no_trial_of_the_others() -> None:
    entries = ranked(MIXED)
    search = Search(entries, [], 4)
    other = Candidate(SLICED, {"mr": 7})
    search.add(other)
    assert names(search.propose(3)) == ["sliced_rows 7", "register_tile 0", "sliced_rows 0"]
    seen = walk(search, lambda candidate: 5.0 if candidate == other else 50.0)
    assert len(seen) == 5
    assert search.best == other


# What was measured.


def test_failures_are_never_the_best_and_do_not_end_the_search(optuna: bool) -> None:
    entries = ranked({SPARSE: [10 + i / 10 for i in range(40)]})
    failing = {e.candidate.key for e in entries[:12]}
    times = as_estimated(entries)
    search = Search(entries, [], 64)
    seen = walk(search, lambda c: None if c.key in failing else times(c))
    assert failing & {candidate.key for candidate in seen}
    assert search.best is not None and search.best.key not in failing
    assert search.best_us == times(search.best)


def test_where_all_fail_there_is_no_best_and_an_end() -> None:
    entries = ranked(MIXED)
    search = Search(entries, [], 64)
    seen = walk(search, lambda candidate: None)
    assert len(seen) == len({candidate.key for candidate in seen})
    assert (search.best, search.best_us, search.history) == (None, None, [])
    assert search.best_of(dense=True) is search.best_of(dense=False) is None


def test_the_best_of_each_kernel_is_known_once_it_ran() -> None:
    search = Search(ranked({SLICED: [20.0, 10.0], DENSE: [15.0], SPARSE: [12.0]}), [], trials=9)
    assert search.best_of_kernels() == []
    for kernel, number, us in ((DENSE, 0, 30.0), (SLICED, 0, 25.0), (SLICED, 1, 40.0)):
        search.tell(Candidate(kernel, {"mr": number}), Outcome("ok", us))
    search.tell(Candidate(SPARSE, {"mr": 0}), Outcome("failed", None))
    assert search.best_of_kernels() == [
        (Candidate(SLICED, {"mr": 0}), 25.0),
        (Candidate(DENSE, {"mr": 0}), 30.0),
    ]


def test_the_best_of_each_kind_is_known() -> None:
    entries = ranked(MIXED)
    search = Search(entries, [], 64)
    times = {SPARSE: 30.0, SLICED: 20.0, DENSE: 25.0, GEMV: 24.0}
    walk(search, lambda candidate: times[candidate.kernel] + candidate.config["mr"])
    assert search.best == Candidate(SLICED, {"mr": 0})
    assert search.best_of(dense=False) == (Candidate(SLICED, {"mr": 0}), 20.0)
    assert search.best_of(dense=True) == (Candidate(GEMV, {"mr": 0}), 24.0)


def test_the_history_is_the_fastest_time_after_each_trial() -> None:
    entries = ranked({SPARSE: [10, 11, 12, 13, 14]})
    times = iter([None, 30.0, 40.0, None, 20.0])
    search = Search(entries, [], 64)
    walk(search, lambda candidate: next(times))
    assert search.history == [(2, 30.0), (3, 30.0), (4, 30.0), (5, 20.0)]


def test_what_is_measured_again_is_no_new_trial() -> None:
    search = Search(ranked({SPARSE: [10, 11]}), [], 64)
    first, second = search.propose(2)
    search.tell(first, Outcome("ok", 20.0))
    search.tell(second, Outcome("ok", 21.0))
    search.tell(first, Outcome("ok", 22.0))
    assert (search.best, search.best_us) == (second, 21.0)
    assert len(search.measured) == len(search.history) == 2


def test_what_was_measured_before_is_taken_in_and_not_measured_again(optuna: bool) -> None:
    entries = ranked({SPARSE: [10 + i / 10 for i in range(40)]})
    before = [Candidate("register_tile", dict(e.candidate.config)) for e in entries[:30:3]]
    search = Search(entries, [], 64)
    for candidate in before:
        search.tell(candidate, Outcome("ok", 30.0))
    assert search.best == before[0]
    seen = walk(search, as_estimated(entries), batch=8)
    assert not {c.key for c in seen} & {c.key for c in before}


def test_a_batch_is_of_different_candidates_and_leaves_the_search_as_it_was(optuna: bool) -> None:
    entries = ranked({SPARSE: [10 + i / 100 for i in range(100)]})
    search = Search(entries, [], 64)
    for candidate in search.propose(9):
        search.tell(candidate, Outcome("ok", 20.0))
    proposed = search.propose(6)
    assert len({candidate.key for candidate in proposed}) == 6
    assert len(search.measured) == 9


def test_the_best_can_be_asked_for_while_another_thread_measures() -> None:
    search = Search([], [], 10**6)
    errors: list[BaseException] = []
    done = threading.Event()

    def look() -> None:
        try:
            while not done.is_set():
                assert search.best_us is None or search.best is not None
                search.best_of(dense=True)
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=look)
    thread.start()
    try:
        for number in range(500):
            search.tell(Candidate(GEMV, {"mr": number}), Outcome("ok", 500.0 - number))
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert errors == []


# A long list.


def synthetic(seed: int, noise: float) -> tuple[list[Ranked], dict[str, float]]:
    """Make 300 candidates with their true times, and estimates that are off by log-normal noise."""
    rng = np.random.default_rng(seed)
    times: dict[str, float] = {}
    entries = []
    space = itertools.product(
        (1, 2, 3, 4, 6, 8, 10, 12, 14, 16), (1, 2, 3, 4, 6), (32, 64, 96, 128, 192, 256)
    )
    for mr, nt, kb in space:
        candidate = Candidate(SPARSE, {"mr": mr, "nt": nt, "kb": kb})
        bowl = abs(math.log2(mr / 6)) ** 1.5 * 0.15 + abs(nt - 3) * 0.1
        time = 100 * (1 + bowl + abs(math.log2(kb / 96)) * 0.08) * math.exp(rng.normal(0, 0.02))
        times[candidate.key] = time
        entries.append(Ranked(candidate, time * math.exp(rng.normal(0, noise))))
    return sorted(entries, key=lambda e: e.estimate), times


def found(seed: int, noise: float, batch: int = 8) -> float:
    """Search with 64 trials; return what was found as a multiple of the optimum."""
    entries, times = synthetic(seed, noise)
    search = Search(entries, [], 64, seed=seed)
    seen = walk(search, lambda candidate: times[candidate.key], batch)
    assert len({candidate.key for candidate in seen}) == len(seen) <= 64
    assert search.best_us is not None
    return search.best_us / min(times.values())


def test_with_estimates_off_by_a_tenth_the_search_finds_the_optimum(optuna: bool) -> None:
    assert sum(found(seed, 0.1) < 1.08 for seed in range(10)) >= 8


def test_with_estimates_off_by_a_quarter_it_comes_close(optuna: bool) -> None:
    # What is expected at 1.6 times the best is cut, and of 300 estimates the best is far too low:
    # the optimum itself is often not among the candidates that are left.
    factors = [found(seed, 0.25) for seed in range(6)]
    assert sum(factor < 1.15 for factor in factors) >= 5


def asked(entries: Sequence[Ranked], batch: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Search, and return after how many measurements TPE was asked."""
    calls: list[int] = []
    search = Search(entries, [], 30)
    ask = search_module._Tpe.ask

    def spy(self: Any, wanted: set[str]) -> Candidate | None:
        calls.append(len(search.measured))
        return ask(self, wanted)

    monkeypatch.setattr(search_module._Tpe, "ask", spy)
    times = itertools.count(1000.0, -20)
    walk(search, lambda candidate: next(times), batch)
    return calls


@pytest.mark.parametrize("batch", [1, 8])
def test_every_second_trial_of_a_long_list_is_left_to_tpe(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    entries, _ = synthetic(0, 0.02)
    assert len(asked(entries, batch, monkeypatch)) == 30 // 2


def test_a_short_list_is_not_left_to_tpe(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    entries = ranked({SPARSE: [10 + i / 100 for i in range(WALK)]})
    assert asked(entries, 1, monkeypatch) == []


def test_tpe_learns_which_values_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    monkeypatch.setattr(search_module, "PATIENCE", 64)
    by_tpe: list[float] = []
    by_estimate: list[float] = []
    for seed in range(2):
        entries, times = synthetic(seed, 0.0)
        # Estimates that know nothing.
        order = np.random.default_rng(seed).permutation(len(entries))
        blind = [replace(entries[i], estimate=100 + n / 1e3) for n, i in enumerate(order)]
        seen = walk(Search(blind, [], 64, seed=seed), lambda c, t=times: t[c.key], 8)
        by_tpe += [times[c.key] for c in seen[33::2]]
        by_estimate += [times[c.key] for c in seen[32::2]]
    assert np.median(by_tpe) < 0.96 * np.median(by_estimate)


def test_the_same_seed_gives_the_same_search() -> None:
    pytest.importorskip("optuna")
    entries, times = synthetic(2, 0.1)
    runs = [
        walk(Search(entries, [], 40, seed=5), lambda c: times[c.key], batch=8) for _ in range(2)
    ]
    assert runs[0] == runs[1]
