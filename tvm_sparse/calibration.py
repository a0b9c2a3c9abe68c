"""How fast this machine really is: one dense kernel, timed, scales every estimate."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from .cpu_features import missing_features, required_features
from .formats import FORMATS
from .planner import template_named
from .targets import X86Machine
from .workload import MatmulGeometry, Workload

# Small enough for L1 and L2, long enough for a clock: about 50 us a call.
_WORKLOAD = Workload("matmul", MatmulGeometry(192, 192, 192))
_ROUNDS = 30

# What one vector multiply-add of that kernel takes, packing included, by how many are issued a
# cycle.
_CYCLES_PER_FMA: dict[int, float] = {2: 0.56, 1: 1.09}

# By target, since one process plans many models: a clock does not change.
_gigahertz: dict[str, float] = {}


def calibrated(machine: X86Machine, target: Any) -> X86Machine:
    """Set the clock of `machine` by measurement, if the target's code runs here.

    The dense kernel's time is known best, so the estimates of all kernels are scaled by it: what
    the plan compares, a sparse kernel and the measured dense one, then speaks in this machine's
    microseconds.

    Returns
    -------
    X86Machine
        Unchanged when the target is for another machine.
    """
    if missing_features(required_features(target)):
        return machine
    key = str(target)
    if key not in _gigahertz:
        _gigahertz[key] = _time_dense_kernel(target, replace(machine, threads=1))
    return replace(machine, gigahertz=_gigahertz[key])


def _time_dense_kernel(target: Any, machine: X86Machine) -> float:
    import tvm

    template = template_named("dense_panels")
    config = template.space(_WORKLOAD, machine)[0]
    geometry = _WORKLOAD.geometry
    assert isinstance(geometry, MatmulGeometry)
    weight = np.ones(geometry.weight_shape, np.float32)
    packed = FORMATS[template.format].pack(weight, config)
    function = template.build(_WORKLOAD, machine, packed, config)
    kernel = tvm.compile(function.with_attr("global_symbol", "calibrate"), target)["calibrate"]
    arrays = [
        np.ones((geometry.n or 1, geometry.k), np.float32),
        *template.arguments(_WORKLOAD, packed),
        np.zeros((geometry.n or 1, geometry.m), np.float32),
    ]
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        kernel(*tensors)
        times.append(time.perf_counter() - start)
    # The fastest round is the machine's; what is slower shared it with others.
    seconds = min(times)
    instructions = geometry.macs() / machine.lanes
    return instructions * _CYCLES_PER_FMA[machine.fma_per_cycle] / seconds / 1e9
