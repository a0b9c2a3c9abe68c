"""TVM's MetaSchedule as one more candidate for dense layers: it proposes, this package measures.

Candidates run in the tuner's own worker, which builds them from the text of their trace: what is
measured, and held against float64, is what a record of that text builds later.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..schedules.x86.metaschedule import METASCHEDULE, trace_text, unscheduled
from ..targets import X86Machine, target_data
from ..workload import Workload
from .job import ROTATION, Job
from .measurer import Candidate, Measurer, Outcome, job_folder

# Candidates between two lessons of the cost model.
_BATCH = 16
# Traces that one generation of the evolution holds. MetaSchedule's own 512 take several times as
# long to breed as to measure what they end in.
_POPULATION = 128
# A trace whose code LLVM cannot compile in this time, or that runs so long, is not the best one:
# unrolled too far, one takes minutes.
_TRIAL_TIMEOUT = 20.0
# Batches without a new trace after which nothing new will come: tiny layers have few.
_BARREN = 3
# Weights that are called in turn are together at most this large; one is used in any case.
_WEIGHT_BYTES = 128 << 20
_LARGEST_SEED = 2**31 - 2


@dataclass(frozen=True)
class DenseSchedule:
    """The best schedule that a search found.

    Attributes
    ----------
    trace : str
        Its steps as JSON: the configuration ``{"trace": ...}`` of the kernel "metaschedule".
    us : float
        Microseconds of a call, the median of several.
    trials : int
        Candidates that were measured, failures included.
    """

    trace: str
    us: float
    trials: int


def search_dense(
    workload: Workload,
    target: Any,
    machine: X86Machine,
    trials: int,
    *,
    seed: int = 0,
    on_trials: Callable[[int, float | None], None] | None = None,
    on_outcome: Callable[[Candidate, Outcome], None] | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    measurer: Measurer | None = None,
) -> DenseSchedule | None:
    """Search for a schedule of a dense layer by MetaSchedule's evolution of traces.

    The cost model that picks candidates is XGBoost's if it is installed, and chance otherwise.

    Parameters
    ----------
    workload : Workload
        A matrix product or a convolution of known shape, with its epilogue and threads.
    target : tvm.target.Target
        What is compiled for; its code has to run here.
    machine : X86Machine
        Gives the vector width.
    trials : int
        Candidates that are measured at most.
    seed : int
        Fixes what is tried first; later choices depend on measured times.
    on_trials : callable, optional
        Called after each measurement with their number, and the best microseconds so far.
    on_outcome : callable, optional
        Called after each measurement with what was measured, and what came.
    work_dir : path, optional
        Folder for MetaSchedule's log; without one there is none.
    measurer : Measurer, optional
        Worker to measure with; by default one that is started here and ended at the end.

    Returns
    -------
    DenseSchedule or None
        None when no candidate ran and was right.

    Raises
    ------
    ValueError
        When the layer has no such schedules: its shape is symbolic, for example.
    """
    function = unscheduled(workload)
    if trials < 1:
        return None
    with ExitStack() as stack:
        logger = stack.enter_context(_own_log(work_dir))
        if measurer is None:
            measurer = stack.enter_context(Measurer(workload.threads, timeout=_TRIAL_TIMEOUT))
        folder = stack.enter_context(job_folder(_random_job(workload, target, machine, seed)))
        evolution = _Evolution(function, workload, target, machine, trials, seed, logger)
        best: tuple[float, str] | None = None
        count = 0
        for texts in evolution.batches():
            candidates = [Candidate(METASCHEDULE.name, {"trace": text}) for text in texts]
            outcomes: dict[int, Outcome] = {}
            for index, outcome in measurer.measure(folder, candidates):
                outcomes[index] = outcome
                count += 1
                if on_outcome is not None:
                    on_outcome(candidates[index], outcome)
                if outcome.us is not None and (best is None or outcome.us < best[0]):
                    best = outcome.us, texts[index]
                if on_trials is not None:
                    on_trials(count, best[0] if best else None)
            evolution.learn([outcomes[index] for index in range(len(texts))])
    return DenseSchedule(best[1], best[0], count) if best else None


class _Evolution:
    """MetaSchedule's evolutionary search, without its builder, runner and task scheduler.

    Those would build and run each candidate in processes of their own, compile it with another
    pipeline, write archives that take a C compiler to link, and time it without looking at what it
    computes.
    """

    def __init__(
        self,
        function: Any,
        workload: Workload,
        target: Any,
        machine: X86Machine,
        trials: int,
        seed: int,
        logger: logging.Logger,
    ) -> None:
        import tvm
        from tvm.s_tir import meta_schedule

        self._ms = meta_schedule
        self._target = tvm.target.Target(
            {**target_data(target), "num-cores": max(1, workload.threads)}
        )
        batch = min(_BATCH, trials)
        population = min(_POPULATION, 8 * trials)
        self._context = _context(
            tvm.IRModule({"main": function.with_attr("global_symbol", "main")}),
            self._target,
            meta_schedule.space_generator.PostOrderApply(
                sch_rules=_rules(machine, workload.threads),
                postprocs="llvm",
                mutator_probs="llvm",
            ),
            # By default the search ends at once where a layer has fewer than 50 distinct traces.
            meta_schedule.search_strategy.EvolutionarySearch(
                population_size=population, init_min_unmeasured=1
            ),
            threads=max(1, workload.threads),
            seed=seed % _LARGEST_SEED + 1,
            logger=logger,
        )
        self._model = _cost_model(meta_schedule, workload.threads)
        # The population's measured members come from it.
        self._database = meta_schedule.database.MemoryDatabase()
        self._entry = self._database.commit_workload(self._context.mod)
        spaces = self._context.generate_design_space()
        self._context.pre_tuning(trials, batch, spaces, self._database, self._model)
        self._candidates: Sequence[Any] = ()

    def batches(self) -> Iterator[list[str]]:
        """Yield traces to measure; `learn` has to be called for each batch."""
        barren = 0
        try:
            while barren < _BARREN:
                candidates = self._context.generate_measure_candidates()
                if candidates is None:
                    return
                barren = 0 if candidates else barren + 1
                self._candidates = candidates
                if candidates:
                    yield [trace_text(candidate.sch) for candidate in candidates]
        finally:
            self._context.post_tuning()

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Take in what the last batch took."""
        results = []
        for candidate, outcome in zip(self._candidates, outcomes, strict=True):
            if outcome.us is None:
                # An empty message would not count as a failure.
                message = outcome.message or outcome.status
                results.append(self._ms.runner.RunnerResult(None, message))
                continue
            seconds = [outcome.us * 1e-6]
            results.append(self._ms.runner.RunnerResult(seconds, None))
            self._database.commit_tuning_record(
                self._ms.database.TuningRecord(
                    candidate.sch.trace, self._entry, seconds, self._target, candidate.args_info
                )
            )
        self._context.notify_runner_results(self._candidates, results)
        self._model.update(self._context, self._candidates, results)


def _context(
    module: Any, target: Any, space: Any, strategy: Any, *, threads: int, seed: int, logger: Any
) -> Any:
    """Make a `TuneContext` as its constructor does, but for what that imports.

    The constructor loads every tensor intrinsic that TVM has, for any processor: 250 functions,
    whose parser looks through all loaded modules for each frame of the stack. That takes from ten
    seconds to minutes, and none of them is used here.
    """
    from tvm.s_tir.meta_schedule import TuneContext, _ffi_api
    from tvm.s_tir.meta_schedule.logging import get_logging_func

    context = TuneContext.__new__(TuneContext)
    context.__init_handle_by_constructor__(
        _ffi_api.TuneContext,
        module,
        target,
        space,
        strategy,
        "main",
        threads,
        seed,
        get_logging_func(logger),
    )
    _ffi_api.TuneContextInitialize(context)
    return context


def _rules(machine: X86Machine, threads: int) -> list[Any]:
    """Return MetaSchedule's rules for CPUs, with two differences.

    The innermost loop over the last axis is always one vector: among tile sizes drawn at random
    few vectorise, and the median candidate takes ten times as long as the best. And one thread
    gets no parallel loops.

    The rules that TVM picks by the target are these with VNNI's products of bytes tried on every
    block.
    """
    from tvm.s_tir.meta_schedule import schedule_rule

    return [
        schedule_rule.InlineConstantScalars(),
        schedule_rule.AutoInline(
            into_producer=False,
            into_consumer=True,
            inline_const_tensor=True,
            disallow_if_then_else=True,
            require_injective=True,
            require_ordered=True,
            # A polynomial put into another one takes minutes to compile: `unscheduled` says why.
            # All of them work on the bits of a float.
            disallow_op=["tirx.reinterpret"],
        ),
        schedule_rule.AddRFactor(max_jobs_per_core=16, max_innermost_factor=64),
        schedule_rule.MultiLevelTilingWideVector(
            structure="SSRSRS",
            vector_length_in_bits=32 * machine.lanes,
            max_innermost_factor=64,
            reuse_read=None,
            reuse_write=schedule_rule.ReuseType(req="may", levels=[1, 2], scope="global"),
        ),
        schedule_rule.ParallelizeVectorizeUnroll(
            max_jobs_per_core=16 if threads > 1 else -1,
            max_vectorize_extent=64,
            unroll_max_steps=[0, 16, 64, 512],
            unroll_explicit=True,
        ),
        schedule_rule.RandomComputeLocation(),
    ]


def _cost_model(meta_schedule: Any, threads: int) -> Any:
    create = meta_schedule.cost_model.CostModel.create
    if importlib.util.find_spec("xgboost") is None:
        return create("random")
    # By default it guesses until 100 candidates were measured: more than most searches have.
    return create("xgb", num_warmup_samples=1, num_tuning_cores=max(1, threads))


def _random_job(workload: Workload, target: Any, machine: X86Machine, seed: int) -> Job:
    """Make weights up: a dense kernel takes the same time on all."""
    geometry = workload.geometry
    assert geometry is not None
    rng = np.random.default_rng(seed)
    rows, columns = geometry.weight_shape
    count = max(1, min(ROTATION, _WEIGHT_BYTES // (4 * rows * columns)))
    return Job(
        workload,
        machine,
        target_data(target),
        [rng.standard_normal((rows, columns), np.float32) for _ in range(count)],
        [rng.standard_normal(rows, np.float32) for _ in range(workload.epilogue.channels)],
    )


@contextmanager
def _own_log(work_dir: str | os.PathLike[str] | None) -> Iterator[logging.Logger]:
    """Keep what MetaSchedule logs from the program's own log."""
    logger = logging.getLogger("tvm.s_tir.meta_schedule")
    handler: logging.Handler = logging.NullHandler()
    if work_dir is not None:
        Path(work_dir).mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(Path(work_dir, "metaschedule.log"))
    before = logger.propagate, logger.level, list(logger.handlers)
    logger.propagate, logger.handlers = False, [handler]
    logger.setLevel(logging.INFO)
    try:
        yield logger
    finally:
        logger.propagate, level, logger.handlers = before
        logger.setLevel(level)
        handler.close()
