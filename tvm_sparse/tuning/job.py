"""What a worker measures on: a workload with its weights, kept in a folder between processes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..records import workload_from
from ..schedules.lookup import symbolic_sizes
from ..targets import CudaMachine, Machine, X86Machine
from ..workload import Conv2dGeometry, MatmulGeometry, Workload

# Weights that are called in turn, as in a network: with one alone the branch predictor learns its
# loops by heart and its bytes stay in the caches. Small ones stay in L2 even so; there it matters
# little, since reading them takes next to no time beside multiplying.
ROTATION = 4
# On a GPU, whose cache holds the weights of many layers, as many as are together larger than it.
_MOST_ROTATION = 16


@dataclass(frozen=True)
class Job:
    """One workload and all that its kernels are called with.

    Attributes
    ----------
    workload : Workload
        As the kernel is built for it; its tokens or batch may be symbolic.
    machine : X86Machine or CudaMachine
        What kernels are shaped by.
    target : mapping
        TVM's description of the target.
    weights : sequence of numpy.ndarray
        Matrices as formats pack them, `rotation_on` of them; the last one is the layer's own.
    channels : sequence of numpy.ndarray
        The epilogue's vectors.
    """

    workload: Workload
    machine: Machine
    target: Mapping[str, Any]
    weights: Sequence[np.ndarray]
    channels: Sequence[np.ndarray]

    def save(self, folder: Path) -> None:
        """Write it to a folder."""
        for kind, arrays in (("weight", self.weights), ("channel", self.channels)):
            for number, array in enumerate(arrays):
                np.save(folder / f"{kind}{number}.npy", array)
        text = json.dumps(
            {
                "workload": asdict(self.workload),
                "machine": asdict(self.machine),
                "target": dict(self.target),
            }
        )
        (folder / "job.json").write_text(text)

    @classmethod
    def load(cls, folder: Path) -> Job:
        """Read it back."""
        data = json.loads((folder / "job.json").read_text())
        return cls(
            workload_from(data["workload"]),
            _machine_from(data["machine"], data["target"]),
            data["target"],
            _arrays(folder, "weight"),
            _arrays(folder, "channel"),
        )

    @property
    def concrete(self) -> MatmulGeometry | Conv2dGeometry:
        """The geometry that is measured: symbolic sizes are what the cost model assumes."""
        geometry = self.workload.geometry
        tokens, batch = symbolic_sizes(self.machine)
        if isinstance(geometry, MatmulGeometry):
            return replace(geometry, n=geometry.n or tokens)
        assert geometry is not None
        return replace(geometry, batch=geometry.batch or batch)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the activations and of the result."""
        g = self.concrete
        if isinstance(g, MatmulGeometry):
            assert g.n is not None
            return (g.n, g.k), (g.n, g.m)
        assert g.batch is not None
        return (
            (g.batch, g.in_channels, g.in_height, g.in_width),
            (g.batch, g.out_channels, g.out_height, g.out_width),
        )


def rotation_on(machine: Machine, nonzeros: int, itemsize: int) -> int:
    """Tell how many weights are called in turn, so that none is found where it lay last time."""
    if not isinstance(machine, CudaMachine):
        return ROTATION
    enough = -(-2 * machine.l2_bytes // max(1, nonzeros * itemsize))
    return max(ROTATION, min(enough, _MOST_ROTATION))


def rotation(
    weights: Sequence[np.ndarray], taps: int = 1, count: int = ROTATION
) -> list[np.ndarray]:
    """Fill up to `count` weights with permutations of those at hand; the first comes last.

    Groups of rows are permuted, and groups of input channels with all their taps: blocks, tiles and
    N:M stay what they are, the lengths of loops come in another order.
    """
    rng = np.random.default_rng(0)
    chosen = list(weights[:count])
    while len(chosen) < count:
        matrix = weights[len(chosen) % len(weights)]
        rows, columns = matrix.shape
        channels = _in_groups(columns // taps, rng)
        order = (channels[:, None] * taps + np.arange(taps)).reshape(-1)
        chosen.append(np.ascontiguousarray(matrix[_in_groups(rows, rng)][:, order]))
    return chosen[::-1]


def _in_groups(count: int, rng: np.random.Generator) -> np.ndarray:
    """Permute groups of 16 neighbours and more, whose number is eight where that many fit.

    What is behind the last whole group stays there.
    """
    group = 1 << max(4, (count // 8).bit_length() - 1)
    whole = count // group
    groups = rng.permutation(whole)[:, None] * group + np.arange(group)
    return np.concatenate([groups.reshape(-1), np.arange(whole * group, count)])


def _machine_from(data: Mapping[str, Any], target: Mapping[str, Any]) -> Machine:
    if target["kind"] == "cuda":
        return CudaMachine(**data)
    return X86Machine(**{**data, "prices": _pairs(data.get("prices", ()))})


def _pairs(values: Any) -> tuple[tuple[str, float], ...]:
    return tuple((str(name), float(value)) for name, value in values)


def _arrays(folder: Path, kind: str) -> list[np.ndarray]:
    count = len(list(folder.glob(f"{kind}*.npy")))
    return [np.load(folder / f"{kind}{number}.npy", mmap_mode="r") for number in range(count)]
