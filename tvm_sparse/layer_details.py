"""What reports show of a layer beside its decision: pictures, candidates, and what bounds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .formats.spies import packed_spy, spy
from .model import Model
from .ops import WeightSite
from .passes.collect_weights import FusedSite
from .pipeline import Lowered
from .planner import Decision
from .profile import SparsityProfile
from .report import LayerReport, Tried
from .schedules.base import matrix_view
from .schedules.lookup import template_named
from .schedules.roofline import bound_by, work
from .spy import Spy
from .targets import Machine

# Cells of one picture, and of all pictures of a report together: some two megabytes of HTML.
MOST_CELLS = 128 * 128
ALL_CELLS = 3 << 20


def most_cells(layers: int) -> int:
    """Tell how many cells each picture of a model with so many layers may have."""
    return max(1, min(MOST_CELLS, ALL_CELLS // max(1, 2 * layers)))


class LayerDetails:
    """Completes the reports of one model's layers.

    Parameters
    ----------
    model, sites, lowered
        What was compiled.
    machine : Machine
        What it was compiled for.
    """

    def __init__(
        self, model: Model, sites: Sequence[FusedSite], lowered: Lowered, machine: Machine
    ) -> None:
        self.model, self.lowered, self.machine = model, lowered, machine
        self.sites = {fused.site.binding: fused.site for fused in sites}
        self.most_cells = most_cells(len(sites))
        # Layers that are packed as one share a picture.
        self._packed: dict[tuple[str, ...], Spy] = {}

    def add(
        self, layer: LayerReport, site: WeightSite, decision: Decision, profile: SparsityProfile
    ) -> LayerReport:
        """Return the report of a layer with all that is known of it."""
        done = work(site.workload, self.machine, profile.nnz, layer.bytes_packed or 0)
        group = self._group(site)
        return replace(
            layer,
            candidates=tried(decision),
            refusals=dict(decision.refusals),
            bound_by=self._bound_by(site, decision, profile),
            operations=done.operations if done else None,
            bytes_moved=done.bytes if done else None,
            spy=self._spy(site),
            packed_spy=self._packed_spy(site, group),
            packed_with=tuple(self.sites[b].name for b in group if b != site.binding),
        )

    def _bound_by(
        self, site: WeightSite, decision: Decision, profile: SparsityProfile
    ) -> str | None:
        if decision.kernel == "tvm":
            return None
        template = template_named(decision.kernel)
        return bound_by(template, site.workload, self.machine, profile, decision.config)

    def _group(self, site: WeightSite) -> tuple[str, ...]:
        call = self.lowered.calls.get(site.binding)
        return call.group if call is not None else ()

    def _matrix(self, site: WeightSite) -> np.ndarray:
        weight: np.ndarray = self.model.params[site.param]
        if weight.ndim == 1:
            return weight.reshape(1, -1)
        return matrix_view(weight, site.workload.op if weight.ndim == 2 else "conv2d")

    def _spy(self, site: WeightSite) -> Spy | None:
        matrix = self._matrix(site)
        return spy(matrix, self.most_cells) if matrix.size else None

    def _packed_spy(self, site: WeightSite, group: tuple[str, ...]) -> Spy | None:
        order = self.lowered.orders.get(site.name)
        if order is None:
            return None
        if group not in self._packed:
            parts = [self._matrix(self.sites[binding]) for binding in group]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            self._packed[group] = packed_spy(whole, order, self.most_cells)
        return self._packed[group]


def tried(decision: Decision) -> tuple[Tried, ...]:
    """List the candidates of a decision for a report."""
    return tuple(
        Tried(c.format, c.kernel, shown_config(c.config), c.expected_us, c.measured)
        for c in decision.candidates
    )


def shown_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a configuration what nobody reads: a schedule's steps are in the plan."""
    return {key: value for key, value in config.items() if key != "trace"}
