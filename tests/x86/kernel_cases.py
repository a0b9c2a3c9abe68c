"""Every weight template at every configuration of its space, over awkward shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dense_support import WIDTHS, machine
from layer_reference import EPILOGUES
from tvm_sparse.schedules.base import KernelTemplate
from tvm_sparse.schedules.x86.templates import TEMPLATES

from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

# Settings that follow from the layer's size and the threads: not what tells configurations apart.
_BY_SIZE = frozenset({"kb", "multiple", "threads", "parts"})

# So small a cache cuts even these shapes into several blocks.
_TINY_L1 = 8 << 10


@dataclass(frozen=True)
class Shape:
    """A workload with the share of nonzeros, the batch of a call, and what L1 is said to be."""

    workload: Workload
    density: float = 0.3
    batch: int = 1
    l1_bytes: int = 48 << 10


@dataclass(frozen=True)
class Case:
    """One kernel to build."""

    template: KernelTemplate
    shape: Shape
    lanes: int
    config: Mapping[str, Any]

    @property
    def workload(self) -> Workload:
        """The workload, planned for the configuration's threads."""
        return replace(self.shape.workload, threads=int(self.config["threads"]))

    def __str__(self) -> str:
        workload, shape = self.workload, self.shape
        settings = " ".join(f"{key}={value}" for key, value in self.config.items())
        return (
            f"{self.template.name} {settings}; {self.lanes} lanes; {workload.geometry}, batch "
            f"{shape.batch}, {shape.density:.0%} nonzeros, {workload.epilogue.describe() or 'bare'}"
        )


def _matmul(m: int, k: int, n: int | None, epilogue: str = "none", **more: Any) -> Shape:
    workload = Workload("matmul", MatmulGeometry(m, k, n), epilogue=EPILOGUES[epilogue])
    return Shape(workload, **{"batch": n, **more})


def _conv(batch: int, inputs: tuple[int, int, int], *rest: Any, **more: Any) -> Shape:
    epilogue, density = more.pop("epilogue", "none"), more.pop("density", 0.3)
    geometry = Conv2dGeometry(batch, *inputs, *rest, **more)
    return Shape(Workload("conv2d", geometry, epilogue=EPILOGUES[epilogue]), density, batch)


# Each count is code of its own.
_FEW_TOKENS = range(1, 16)
_TELLING_TOKENS = (1, 8, 9, 15)


def matmul_shapes(few_tokens: Iterable[int] = _FEW_TOKENS) -> list[Shape]:
    """Tails in every dimension, few tokens, several blocks, no nonzeros, any batch."""
    epilogues = itertools.cycle(("none", "bias", "bias+residual+relu"))
    few = [_matmul(17 + 2 * n, 30 + 5 * n, n, next(epilogues)) for n in few_tokens]
    return [
        *few,
        _matmul(1, 1, 1),
        _matmul(1, 70, 40, "bias"),
        _matmul(65, 67, 65, "bias+residual+relu"),
        _matmul(48, 96, 64),
        _matmul(33, 200, 100, "bias", l1_bytes=_TINY_L1),
        _matmul(71, 129, 3, "bias+gelu", l1_bytes=_TINY_L1),
        _matmul(23, 50, 17, "bias", density=0.0),
        _matmul(23, 50, 16, "bias", density=1.0),
        _matmul(31, 45, None, "bias+residual+relu", batch=5),
        _matmul(31, 45, None, "bias", batch=85, l1_bytes=_TINY_L1),
    ]


def conv2d_shapes() -> list[Shape]:
    """Padding, strides, dilation, unaligned pixels, small images, groups, no nonzeros."""
    around = lambda width: {"padding": (width,) * 4}  # noqa: E731
    residual = "bias+residual+relu"
    return [
        _conv(1, (5, 7, 7), 23, (3, 3), **around(1), epilogue=residual),
        _conv(2, (6, 15, 13), 17, (3, 3), strides=(2, 2), **around(1), epilogue="bias"),
        _conv(1, (7, 12, 17), 17, (3, 3), dilation=(2, 2), **around(2)),
        _conv(2, (21, 7, 7), 19, (1, 1), epilogue=residual),
        _conv(1, (16, 14, 14), 33, (1, 1), epilogue="bias+gelu"),
        _conv(1, (9, 11, 13), 16, (1, 1), strides=(2, 2), epilogue="bias"),
        _conv(1, (9, 6, 5), 18, (1, 1), **around(1)),
        _conv(1, (3, 21, 22), 20, (7, 7), strides=(2, 2), **around(3), epilogue="bias"),
        _conv(2, (4, 9, 40), 21, (2, 3), padding=(0, 1, 2, 0)),
        _conv(1, (8, 10, 18), 24, (3, 3), epilogue=residual),
        _conv(1, (3, 5, 1), 4, (3, 1), padding=(1, 0, 1, 0)),
        _conv(1, (4, 7, 9), 19, (3, 3), **around(1), density=0.0),
        _conv(2, (6, 9, 11), 6, (3, 3), **around(1), groups=6, epilogue=residual),
        _conv(1, (5, 8, 17), 5, (5, 5), strides=(2, 2), **around(2), groups=5, epilogue="bias"),
        _conv(1, (4, 9, 9), 6, (3, 3), **around(1), groups=2),
    ]


def _configurations(template: KernelTemplate, shape: Shape, lanes: int) -> list[dict[str, Any]]:
    cpu = replace(machine(lanes), l1_bytes=shape.l1_bytes)
    if not template.supports(shape.workload, cpu):
        return []
    return [dict(config) for config in template.space(shape.workload, cpu)]


def _on_threads(config: dict[str, Any], threads: int) -> dict[str, Any]:
    shares = {"parts": threads} if "parts" in config else {}
    return {**config, "threads": threads, **shares}


def all_cases(op: str, lanes: int) -> Iterator[Case]:
    """Every configuration on every shape, on one thread and on two."""
    shapes = matmul_shapes() if op == "matmul" else conv2d_shapes()
    for template, shape, threads in itertools.product(TEMPLATES, shapes, (1, 2)):
        for config in _configurations(template, shape, lanes):
            yield Case(template, shape, lanes, _on_threads(config, threads))


def chosen_cases(op: str, lanes: int) -> Iterator[Case]:
    """Every shape once and every configuration once for each template, threads in turns.

    The counts of few tokens are shared out among the vector widths.
    """
    share = list(WIDTHS).index(lanes)
    tokens = [n for n in _FEW_TOKENS if n % len(WIDTHS) == share or n in _TELLING_TOKENS]
    shapes = matmul_shapes(tokens) if op == "matmul" else conv2d_shapes()
    threads = itertools.cycle((1, 2))
    for template in TEMPLATES:
        spaces = [_configurations(template, shape, lanes) for shape in shapes]
        missed = {
            _key(config): (shape, config)
            for shape, space in zip(shapes, spaces, strict=True)
            for config in space
        }
        chosen = []
        for turn, (shape, space) in enumerate(zip(shapes, spaces, strict=True)):
            if space:
                config = space[turn % len(space)]
                missed.pop(_key(config), None)
                chosen.append((shape, config))
        for shape, config in [*chosen, *missed.values()]:
            yield Case(template, shape, lanes, _on_threads(config, next(threads)))


def _key(config: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    return frozenset((key, value) for key, value in config.items() if key not in _BY_SIZE)
