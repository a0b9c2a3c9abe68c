"""Find kernel templates by name."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import PlanError
from ..targets import CudaMachine, Machine
from ..workload import Workload
from .base import Config, KernelTemplate
from .cuda import cost as cuda_cost
from .cuda.cost import stock_microseconds
from .cuda.templates import TEMPLATES as CUDA_TEMPLATES
from .x86 import cost as x86_cost
from .x86.spaces import tuning_space as x86_tuning_space
from .x86.templates import TEMPLATES as X86_TEMPLATES

# Formats that hold every element, zero or not.
DENSE_FORMATS: frozenset[str] = frozenset({"dense", "plain"})


ALL_TEMPLATES: tuple[KernelTemplate, ...] = (*X86_TEMPLATES, *CUDA_TEMPLATES)


def templates_for(machine: Machine) -> Sequence[KernelTemplate]:
    """Return the kernel templates of a target's kind."""
    return CUDA_TEMPLATES if isinstance(machine, CudaMachine) else X86_TEMPLATES


def stock_dense(workload: Workload, machine: Machine) -> float | None:
    """Estimate the microseconds of TVM's own dense kernel; None: templates beat it."""
    return stock_microseconds(workload, machine) if isinstance(machine, CudaMachine) else None


def tuning_space(
    template: KernelTemplate, workload: Workload, machine: Machine
) -> Sequence[Config]:
    """List the configurations of a template that tuning may measure on a machine."""
    if isinstance(machine, CudaMachine):
        return template.space(workload, machine)
    return x86_tuning_space(template, workload, machine)


def symbolic_sizes(machine: Machine) -> tuple[int, int]:
    """Return the tokens and images that kernels for any number of them are planned for."""
    kind = cuda_cost if isinstance(machine, CudaMachine) else x86_cost
    return kind.SYMBOLIC_TOKENS, kind.SYMBOLIC_BATCH


def template_named(name: str) -> KernelTemplate:
    """Look up a kernel template.

    Raises
    ------
    PlanError
        When there is none of that name.
    """
    for template in ALL_TEMPLATES:
        if template.name == name:
            return template
    known = ", ".join(template.name for template in ALL_TEMPLATES)
    raise PlanError(f"no kernel is called '{name}'; there are {known}, and 'tvm'")
