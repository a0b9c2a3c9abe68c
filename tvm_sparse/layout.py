"""What the layout of activations means for kernels: which take panels, and which become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import PlanError
from .model import Model
from .ops import WeightSite
from .panels import Panels, split_evenly
from .passes.choose_layout import Layout, choose_layout, panels_of
from .passes.collect_weights import FusedSite
from .passes.fuse_epilogue import Body
from .planner import Decision, check_config
from .schedules.lookup import template_named
from .schedules.x86.cost import panels_gain
from .targets import CudaMachine, Machine, X86Machine
from .workload import MatmulGeometry, Workload


@dataclass(frozen=True)
class Task:
    """A layer and the kernel that it gets.

    Attributes
    ----------
    fused_site : FusedSite
    kernel : str
        Name of the template.
    config : mapping
        Its configuration.
    panels : Panels or None
        How its activations are cut when they are in panels.
    """

    fused_site: FusedSite
    kernel: str
    config: Mapping[str, Any]
    panels: Panels | None = None

    @property
    def site(self) -> WeightSite:
        """The layer."""
        return self.fused_site.site


def check_decision(site: WeightSite, decision: Decision, machine: Machine) -> None:
    """Refuse a decision that a layer cannot have.

    Raises
    ------
    PlanError
        With the reason.
    """
    where = f"layer '{decision.name}' cannot run on '{decision.kernel}'"
    if site.refusal:
        raise PlanError(f"{where}: {site.refusal}")
    template = template_named(decision.kernel)
    match = template.takes(site.workload, machine)
    if not match:
        raise PlanError(f"{where}: {match.reason}")
    check_config(decision.name, template, site.workload, machine, decision.config)


def lay_out(
    model: Model, sites: Sequence[FusedSite], tasks: Sequence[Task], machine: Machine
) -> tuple[Layout, list[Task]]:
    """Choose the layout of activations; return it, and the tasks as they are then."""
    if isinstance(machine, CudaMachine):
        return Layout(), list(tasks)
    gains = {
        task.site.binding: panels_gain(task.site.workload, machine, other.config)
        for task in tasks
        if (other := _in_panels(task, machine)) is not None
    }
    layout = choose_layout(Body(model), sites, gains, machine)
    chosen = []
    for task in tasks:
        takes_panels = layout.takes_panels(task.fused_site)
        other = _in_panels(task, machine, layout.parts) if takes_panels else None
        chosen.append(other or task)
    return layout, chosen


def _in_panels(task: Task, machine: X86Machine, parts: int = 1) -> Task | None:
    """Give a layer's kernel panels: its own tile where that fits, else the nearest that does."""
    geometry = task.site.workload.geometry
    if not isinstance(geometry, MatmulGeometry) or geometry.n is None:
        return None
    tokens = geometry.n // parts
    panels, template = panels_of(tokens, machine), template_named(task.kernel)
    workload = in_panels(task.site.workload, tokens)
    if panels is None or not template.takes(workload, machine):
        return None
    space = [
        config
        for config in template.space(workload, machine)
        if split_evenly(tokens, int(config["nt"]), machine.lanes) == panels.tiles
    ]
    if not space:
        return None
    wanted = task.config
    nearest = min(space, key=lambda c: (abs(c["mr"] - wanted["mr"]), abs(c["kb"] - wanted["kb"])))
    if split_evenly(tokens, int(wanted["nt"]), machine.lanes) == panels.tiles:
        shared = {"threads": nearest["threads"], "parts": nearest["parts"]}
        nearest = {**nearest, **wanted, **(shared if parts > 1 else {})}
    return replace(task, config=nearest, panels=panels)


def in_panels(workload: Workload, tokens: int) -> Workload:
    """Describe the same operator on some tokens in panels."""
    assert isinstance(workload.geometry, MatmulGeometry)
    return replace(workload, geometry=replace(workload.geometry, layout="panels", n=tokens))


def together(layout: Layout, tasks: Sequence[Task]) -> list[list[Task]]:
    """Group the tasks that one kernel can do: what an attention reads, on the same kernel."""
    by_result = {task.fused_site.fused.result: task for task in tasks}
    grouped: dict[int, list[Task]] = {}
    for results in layout.together:
        group = [by_result[result] for result in results]
        if len({_what_must_agree(task) for task in group}) == 1:
            grouped.update({result: group for result in results})
    done: set[int] = set()
    found = []
    for task in tasks:
        result = task.fused_site.fused.result
        if result not in done:
            group = grouped.get(result, [task])
            done.update(t.fused_site.fused.result for t in group)
            found.append(group)
    return found


def _what_must_agree(task: Task) -> tuple[str, str, Workload]:
    """Name the kernel, its configuration, and the workload but for the number of its features."""
    workload = task.site.workload
    assert isinstance(workload.geometry, MatmulGeometry)
    anyhow = replace(workload, geometry=replace(workload.geometry, m=0))
    return task.kernel, repr(sorted(task.config.items())), anyhow


def workload_of(group: Sequence[Task]) -> Workload:
    """Describe what some layers compute together: all their features, of the same activations."""
    workload = group[0].site.workload
    panels = group[0].panels
    if panels is None:
        return workload
    rows = 0
    for task in group:
        assert task.site.workload.geometry is not None
        rows += task.site.workload.geometry.weight_shape[0]
    geometry = workload.geometry
    assert isinstance(geometry, MatmulGeometry)
    return in_panels(replace(workload, geometry=replace(geometry, m=rows)), panels.tokens)
