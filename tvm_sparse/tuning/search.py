"""In which order the candidates of one task are measured, and when enough of them were.

Candidates are ranked by the cost model. What it expects to be far behind is left out; a short list
is walked in the order of the estimates; in a long one Optuna's TPE learns which values of which
parameter are fast (J. Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NIPS 2011).
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..schedules.lookup import DENSE_FORMATS, template_named
from .measurer import Candidate, Outcome

# Estimates are off by a tenth as a rule and rarely by half: what is expected to take this many
# times as long as the best is not measured.
CUT = 1.6
# What is expected to be this far behind the best, measured or expected, needs no look either.
_HOPELESS = 2.0
# Of every kernel one configuration is tried, unless it is expected to be this far behind.
_SENSELESS = 20.0
# Trials without an improvement of this share, after which a task is done.
PATIENCE = 24
_IMPROVEMENT = 0.01
# A list of up to this many candidates is walked from end to end.
WALK = 24
# Follow from other parameters.
_DERIVED = frozenset({"multiple", "groups"})
# How often TPE may propose what was measured already before the best estimate is taken instead.
_PROPOSALS = 20


@dataclass(frozen=True)
class Ranked:
    """A candidate with its estimate in microseconds."""

    candidate: Candidate
    estimate: float

    @property
    def is_dense(self) -> bool:
        """Whether it multiplies by zeros."""
        return template_named(self.candidate.kernel).format in DENSE_FORMATS


@dataclass
class Search:
    """The state of one task's search.

    Attributes
    ----------
    ranked : sequence of Ranked
        All candidates, the one with the smallest estimate first.
    first : sequence of Candidate
        Measured before all others: the plan's own choice, and hints from other records.
    trials : int
        How many may be measured.
    measured : dict of str to Outcome
        By the candidate's key, in the order of the trials.
    candidates : dict of str to Candidate
        By the same key, whether measured or not.
    history : list of (int, float)
        The fastest time after each trial.
    """

    ranked: Sequence[Ranked]
    first: Sequence[Candidate]
    trials: int
    seed: int = 0
    measured: dict[str, Outcome] = field(default_factory=dict)
    candidates: dict[str, Candidate] = field(default_factory=dict)
    history: list[tuple[int, float]] = field(default_factory=list)
    # Replaced as a whole after each trial and never changed: the live table reads it from another
    # thread than the one that measures.
    _fastest: dict[bool, tuple[float, Candidate]] = field(default_factory=dict)
    _sampler: Any = None
    _stale: int = 0

    def __post_init__(self) -> None:
        for candidate in (*self.first, *(entry.candidate for entry in self.ranked)):
            self.candidates[candidate.key] = candidate
        self._queue = self._openers()
        promising = self._promising()
        self._is_long = len(promising) > max(WALK, len(self._queue))

    def _openers(self) -> list[Candidate]:
        """Return what comes first: given candidates, then the best estimate of every kernel."""
        best: dict[str, Candidate] = {}
        for entry in self.ranked:
            if entry.estimate <= _SENSELESS * self.ranked[0].estimate:
                best.setdefault(entry.candidate.kernel, entry.candidate)
        return list({c.key: c for c in [*self.first, *best.values()]}.values())

    def _promising(self) -> list[Ranked]:
        """Leave out what is expected far behind the best of its kind, or the best measurement.

        Dense kernels compete with each other: a report wants to know the best of them.
        """
        if not self.ranked:
            return []
        fastest = min(self.ranked[0].estimate, self.best_us or math.inf)
        kept = []
        for dense in (True, False):
            kind = [r for r in self.ranked if r.is_dense == dense]
            limit = CUT * kind[0].estimate if kind else 0.0
            kept += [r for r in kind if r.estimate <= min(limit, _HOPELESS * fastest)]
        return sorted(kept, key=lambda r: r.estimate)

    @property
    def best(self) -> Candidate | None:
        """The fastest candidate so far."""
        fastest = self._fastest_of_all()
        return fastest[1] if fastest else None

    @property
    def best_us(self) -> float | None:
        """Its time."""
        fastest = self._fastest_of_all()
        return fastest[0] if fastest else None

    def best_of(self, dense: bool) -> tuple[Candidate, float] | None:
        """Return the fastest dense, or the fastest sparse candidate."""
        fastest = self._fastest.get(dense)
        return (fastest[1], fastest[0]) if fastest else None

    def best_of_kernels(self) -> list[tuple[Candidate, float]]:
        """Return the fastest candidate of each kernel, the fastest first."""
        found: dict[str, tuple[Candidate, float]] = {}
        for key, outcome in self.measured.items():
            candidate = self.candidates[key]
            known = found.get(candidate.kernel)
            if outcome.us is not None and (known is None or outcome.us < known[1]):
                found[candidate.kernel] = (candidate, outcome.us)
        return sorted(found.values(), key=lambda pair: pair[1])

    def _fastest_of_all(self) -> tuple[float, Candidate] | None:
        return min(self._fastest.values(), key=lambda pair: pair[0], default=None)

    def _fastest_by_kind(self) -> dict[bool, tuple[float, Candidate]]:
        """Find the fastest dense (True) and the fastest sparse candidate (False)."""
        found: dict[bool, tuple[float, Candidate]] = {}
        for key, outcome in self.measured.items():
            if outcome.us is None:
                continue
            candidate = self.candidates[key]
            dense = template_named(candidate.kernel).format in DENSE_FORMATS
            if dense not in found or outcome.us < found[dense][0]:
                found[dense] = (outcome.us, candidate)
        return found

    @property
    def done(self) -> bool:
        """Whether nothing is left that is worth a trial."""
        if len(self.measured) >= self.trials:
            return True
        if any(c.key not in self.measured for c in self._queue):
            return False
        return self._stale >= PATIENCE or not self._left()

    @property
    def patience_left(self) -> float:
        """From 1, just improved, down to 0."""
        return max(0.0, 1 - self._stale / PATIENCE)

    def _left(self) -> list[Ranked]:
        return [r for r in self._promising() if r.candidate.key not in self.measured]

    def propose(self, count: int) -> list[Candidate]:
        """Name the next candidates to measure, at most `count`, different ones."""
        room = max(0, min(count, self.trials - len(self.measured)))
        chosen: dict[str, Candidate] = {}
        waiting = [c for c in self._queue if c.key not in self.measured]
        for candidate in waiting[:room]:
            chosen[candidate.key] = candidate
        left = self._left()
        while len(chosen) < room and self._stale < PATIENCE:
            open_ones = [r for r in left if r.candidate.key not in chosen]
            if not open_ones:
                break
            candidate = self._next(open_ones, len(self.measured) + len(chosen))
            chosen[candidate.key] = candidate
        return list(chosen.values())

    def _next(self, left: Sequence[Ranked], trial: int) -> Candidate:
        # Every second trial follows the estimates: they know more than a few measurements.
        if self._is_long and trial % 2 and _has_optuna():
            if self._sampler is None:
                self._sampler = _Tpe([r.candidate for r in self._promising()], self.seed)
                for key, outcome in self.measured.items():
                    self._sampler.tell(key, outcome.us)
            proposed = self._sampler.ask({r.candidate.key for r in left})
            if proposed is not None:
                return proposed
        return left[0].candidate

    def tell(self, candidate: Candidate, outcome: Outcome) -> None:
        """Take in a measurement."""
        before = self.best_us
        is_new = candidate.key not in self.measured
        self.candidates.setdefault(candidate.key, candidate)
        self.measured[candidate.key] = outcome
        self._fastest = self._fastest_by_kind()
        if self._sampler is not None:
            self._sampler.tell(candidate.key, outcome.us)
        after = self.best_us
        improved = after is not None and (before is None or after < before * (1 - _IMPROVEMENT))
        self._stale = 0 if improved else self._stale + 1
        if after is not None and is_new:
            self.history.append((len(self.measured), after))

    def add(self, candidate: Candidate) -> None:
        """Let a candidate from elsewhere be measured next."""
        self.candidates[candidate.key] = candidate
        self._queue.insert(0, candidate)
        self.trials += 1


def _has_optuna() -> bool:
    return importlib.util.find_spec("optuna") is not None


class _Tpe:
    """Optuna's TPE over the parameters that the candidates differ in."""

    def __init__(self, candidates: Sequence[Candidate], seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            # Multivariate sampling is experimental since years, and what is wanted here: tile and
            # block belong together.
            warnings.simplefilter("ignore")
            sampler = optuna.samplers.TPESampler(
                seed=seed, multivariate=True, group=True, n_startup_trials=0
            )
        self._optuna = optuna
        self._study = optuna.create_study(sampler=sampler)
        self._candidates = {c.key: c for c in candidates}
        self._choices = _choices(candidates)
        self._by_place = {self._place(c): c for c in candidates}
        self._told: set[str] = set()

    def tell(self, key: str, us: float | None) -> None:
        """Take in a measurement; failures are told as such."""
        candidate = self._candidates.get(key)
        if candidate is None or key in self._told or us is None or not us > 0:
            return
        self._told.add(key)
        trial = self._optuna.trial.create_trial(
            params=dict(
                zip(self._distributions(candidate.kernel), self._place(candidate), strict=True)
            ),
            distributions=self._distributions(candidate.kernel),
            value=math.log(us),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._study.add_trial(trial)

    def _place(self, candidate: Candidate) -> tuple[Any, ...]:
        """Return the kernel, and the place of each of its parameters' values."""
        choices = self._choices[candidate.kernel]
        places = [values.index(candidate.config[name]) for name, values in choices.items()]
        return (candidate.kernel, *places)

    def _distributions(self, kernel: str) -> dict[str, Any]:
        """Describe the parameters: values by their place in order, so that neighbours are near."""
        kinds = self._optuna.distributions
        found = {"kernel": kinds.CategoricalDistribution(sorted(self._choices))}
        for name, values in self._choices[kernel].items():
            found[f"{kernel}.{name}"] = kinds.IntDistribution(0, len(values) - 1)
        return found

    def ask(self, wanted: set[str]) -> Candidate | None:
        """Propose one of the wanted candidates; None when TPE keeps to those that are known."""
        state = self._optuna.trial.TrialState.FAIL
        for _ in range(_PROPOSALS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trial = self._study.ask()
                kernel = trial.suggest_categorical("kernel", sorted(self._choices))
                places = tuple(
                    trial.suggest_int(f"{kernel}.{name}", 0, len(values) - 1)
                    for name, values in self._choices[kernel].items()
                )
                self._study.tell(trial, state=state)
            candidate = self._by_place.get((kernel, *places))
            if candidate is not None and candidate.key in wanted:
                return candidate
        return None


def _choices(candidates: Sequence[Candidate]) -> dict[str, dict[str, list[Any]]]:
    """List, by kernel, the values of every parameter that varies."""
    found: dict[str, dict[str, list[Any]]] = {}
    for candidate in candidates:
        values = found.setdefault(candidate.kernel, {})
        for name, value in candidate.config.items():
            if name in _DERIVED:
                continue
            values.setdefault(name, [])
            if value not in values[name]:
                values[name].append(value)
    return {
        kernel: {n: sorted(v) for n, v in values.items() if len(v) > 1}
        for kernel, values in found.items()
    }
