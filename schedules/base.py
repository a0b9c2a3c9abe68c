"""What a kernel template is, and what building one gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..formats import Match, PackedWeight
from ..profile import SparsityProfile
from ..workload import Workload

Config = Mapping[str, Any]


def _in_order(workload: Workload, packed: PackedWeight) -> Sequence[np.ndarray]:
    return list(packed.arrays.values())


def _nothing_amiss(workload: Workload, machine: Any, config: Config) -> str:
    return ""


@dataclass(frozen=True)
class KernelTemplate:
    """One family of kernels.

    What a machine is depends on the target: `targets.X86Machine`, or `targets.CudaMachine`.

    Attributes
    ----------
    name : str
        Key in the table of templates, shown in reports.
    format : str
        The weight format that it reads, a key of `formats.FORMATS`.
    supports : callable
        (workload, machine) -> Match: whether it can compute this, else the reason. Called for
        workloads of its `dtypes` only.
    space : callable
        (workload, machine) -> list of configurations, the default first.
    build : callable
        (workload, machine, packed weight, config) -> PrimFunc with the arguments x, those of
        `arguments`, the per-channel vectors, the tensors of the epilogue, y. It depends on the
        packed weight's shape and config, not on its arrays.
    events : callable
        (workload, machine, profile, config) -> how often the kernel does each thing that has a
        price in the target's cost model.
    estimate : callable
        (workload, machine, profile, config) -> microseconds, what those events come to.
    arguments : callable
        (workload, packed weight) -> the arrays that the function takes, in order.
    check : callable
        (workload, machine, config) -> what a configuration of whole positive numbers, written by
        hand, needs to have; empty when it can be built.
    dtypes : frozenset of str
        Types of the weight, the activations and the result, which are one; see `takes`.
    on_tensor_cores : bool
        Whether it multiplies on a GPU's tensor cores, whose sums are cut off and not rounded.
    """

    name: str
    format: str
    supports: Callable[[Workload, Any], Match]
    space: Callable[[Workload, Any], Sequence[Config]]
    build: Callable[[Workload, Any, PackedWeight, Config], Any]
    events: Callable[[Workload, Any, SparsityProfile, Config], Mapping[str, float]]
    estimate: Callable[[Workload, Any, SparsityProfile, Config], float]
    arguments: Callable[[Workload, PackedWeight], Sequence[np.ndarray]] = _in_order
    check: Callable[[Workload, Any, Config], str] = _nothing_amiss
    dtypes: frozenset[str] = frozenset({"float32"})
    on_tensor_cores: bool = False

    def takes(self, workload: Workload, machine: Any) -> Match:
        """Tell whether it is for the workload's type and supports all else, else the reason."""
        if workload.dtype not in self.dtypes:
            known = " and ".join(sorted(self.dtypes))
            return Match(False, f"the weight is {workload.dtype}; its kernels are for {known}")
        return self.supports(workload, machine)


def matrix_view(weight: np.ndarray, op: str) -> np.ndarray:
    """Show a weight as formats pack it: [output features, everything else].

    A matmul weight is stored [K, M] and seen transposed; a convolution's OIHW weight is flattened
    behind its first axis.
    """
    return weight.T if op == "matmul" else weight.reshape(weight.shape[0], -1)
