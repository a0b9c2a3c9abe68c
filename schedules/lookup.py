"""Find kernel templates by name."""

from __future__ import annotations

from ..errors import PlanError
from .base import KernelTemplate
from .x86.templates import TEMPLATES

# Formats that hold every element, zero or not.
DENSE_FORMATS: frozenset[str] = frozenset({"dense", "plain"})


def template_named(name: str) -> KernelTemplate:
    """Look up a kernel template.

    Raises
    ------
    PlanError
        When there is none of that name.
    """
    for template in TEMPLATES:
        if template.name == name:
            return template
    known = ", ".join(template.name for template in TEMPLATES)
    raise PlanError(f"no kernel is called '{name}'; there are {known}, and 'tvm'")
