"""How fast this machine really is: one dense kernel, timed, scales every estimate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .cpu_features import machine_identity, missing_features, required_features
from .targets import Machine, X86Machine, machine_of
from .tuning.calibrate import load_calibration, measure_gigahertz

# By target, since one process plans many models: a clock does not change.
_gigahertz: dict[str, float] = {}


def planned_machine(target: Any, threads: int | None) -> Machine:
    """Tell what plans for a target must know; a processor that is here was measured."""
    machine = machine_of(target, threads)
    return calibrated(machine, target) if isinstance(machine, X86Machine) else machine


def calibrated(machine: X86Machine, target: Any) -> X86Machine:
    """Set the clock of `machine` by measurement, if the target's code runs here.

    The dense kernel's time is known best, so the estimates of all kernels are scaled by it: what
    the plan compares, a sparse kernel and the measured dense one, then speaks in this machine's
    microseconds. Where `tvm-sparse calibrate` has measured this machine, its prices count, too.

    Returns
    -------
    X86Machine
        Unchanged when the target is for another machine.
    """
    if missing_features(required_features(target)):
        return machine
    key = str(target)
    if key not in _gigahertz:
        _gigahertz[key] = measure_gigahertz(target, machine)
    machine = replace(machine, gigahertz=_gigahertz[key])
    stored = load_calibration(machine_identity(), target)
    return stored.apply(machine) if stored else machine
