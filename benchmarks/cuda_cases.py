"""The layers that `cuda.py` builds and times, and their pruned weights. NumPy only."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from smtx import read_smtx

from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

# Sigma of the logarithm of the scales of rows, of columns, and of whole kernels of a convolution:
# with these, pruned weights are as uneven as trained ones.
_ROWS, _COLUMNS, _KERNELS = 0.12, 0.16, 0.55


@dataclass(frozen=True)
class Case:
    """One layer with its pruned weight.

    Attributes
    ----------
    group : str
        What the layer is in the table for; the first part of its name.
    form : str
        How zeros lie: "unstructured", "N:M", "V:N:M" (columns by V rows, then N of every 4),
        "block:RxC", "tile-wise:G", or "smtx:FILE" (as in a matrix of DLMC).
    zeros : float
        Share of zeros; N:M and V:N:M have it from their numbers.
    format : str
        The weight format that it is forced to.
    """

    group: str
    geometry: MatmulGeometry | Conv2dGeometry
    dtype: str
    form: str
    zeros: float
    format: str
    seed: int = 0

    @property
    def name(self) -> str:
        """Group, shape and zeros, for example ``tile-wise/768x3072x12800/75``."""
        sizes = {"block": self.form.removeprefix("block:"), "v:n:m": self.form}
        if self.form.startswith("smtx:"):
            sizes[self.group] = Path(self.form).stem
        middle = f"{sizes[self.group]}/" if self.group in sizes else ""
        return f"{self.group}/{middle}{describe(self.geometry)}/{100 * self.zeros:g}"

    @property
    def op(self) -> str:
        """Name of the operator."""
        return "matmul" if isinstance(self.geometry, MatmulGeometry) else "conv2d"

    @property
    def workload(self) -> Workload:
        """Describe the layer to the kernel templates."""
        return Workload(self.op, self.geometry, self.dtype)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the activations and of the result."""
        g = self.geometry
        if isinstance(g, MatmulGeometry):
            assert g.n is not None
            return (g.n, g.k), (g.n, g.m)
        assert g.batch is not None
        return (
            (g.batch, g.in_channels, g.in_height, g.in_width),
            (g.batch, g.out_channels, g.out_height, g.out_width),
        )

    @property
    def columns(self) -> int:
        """Columns of the product that the layer is: tokens, or pixels of all images."""
        g = self.geometry
        if isinstance(g, MatmulGeometry):
            return g.n or 1
        return g.pixels * (g.batch or 1)

    def weight(self) -> np.ndarray:
        """Draw the pruned weight as a matrix [outputs, everything else] of `dtype`."""
        rng = np.random.default_rng(self.seed)
        weight = _drawn(rng, self.geometry)
        weight *= kept(np.abs(weight), self.form, self.zeros)
        # Results are then about as large as the activations, and fit in float16.
        size = np.sqrt(np.mean(np.square(weight)) * weight.shape[1])
        return (weight / np.float32(size)).astype(self.dtype)

    def input(self) -> np.ndarray:
        """Draw activations of `dtype`."""
        rng = np.random.default_rng(self.seed + 1)
        return rng.standard_normal(self.shapes[0], np.float32).astype(self.dtype)

    def to_data(self) -> dict[str, Any]:
        """Return plain data, from which `from_data` makes it again."""
        return {**asdict(self), "name": self.name, "op": self.op}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Case:
        """Read a case back.

        Raises
        ------
        KeyError, TypeError
            When a field is missing or unknown.
        """
        geometry = {k: tuple(v) if isinstance(v, list) else v for k, v in data["geometry"].items()}
        kind = MatmulGeometry if data["op"] == "matmul" else Conv2dGeometry
        names = ("group", "dtype", "form", "zeros", "format", "seed")
        return cls(geometry=kind(**geometry), **{name: data[name] for name in names})


def describe(geometry: MatmulGeometry | Conv2dGeometry) -> str:
    """Write a shape as it stands in a name."""
    if isinstance(geometry, MatmulGeometry):
        return f"{geometry.m}x{geometry.k}x{geometry.n}"
    g = geometry
    stride = f"s{g.strides[0]}" if g.strides != (1, 1) else ""
    taps = f"{g.kernel[0]}x{g.kernel[1]}{stride}"
    return f"{taps}_{g.in_channels}-{g.out_channels}@{g.in_height}b{g.batch}"


def _drawn(rng: np.random.Generator, geometry: MatmulGeometry | Conv2dGeometry) -> np.ndarray:
    rows, columns = geometry.weight_shape
    weight = rng.standard_normal((rows, columns), np.float32)
    weight *= _scales(rng, (rows, 1), _ROWS)
    weight *= _scales(rng, (1, columns), _COLUMNS)
    taps = 1
    if isinstance(geometry, Conv2dGeometry):
        taps = geometry.kernel[0] * geometry.kernel[1]
    if taps > 1:
        weight *= np.repeat(_scales(rng, (rows, columns // taps), _KERNELS), taps, axis=1)
    return weight


def _scales(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> np.ndarray:
    return np.exp(np.float32(sigma) * rng.standard_normal(shape, np.float32))


def kept(magnitude: np.ndarray, form: str, zeros: float) -> np.ndarray:
    """Mark what stays of a matrix [outputs, inputs] when the smallest go.

    Raises
    ------
    ValueError
        When there is no such form.
    """
    numbers = [int(number) for number in re.findall(r"\d+", form)]
    if form.startswith("smtx:"):
        return read_smtx(form.removeprefix("smtx:"))
    if form == "unstructured":
        return _largest(magnitude, 1 - zeros)
    if form.startswith("block:"):
        return _blocks(magnitude, numbers[0], numbers[1], 1 - zeros)
    if form.startswith("tile-wise:"):
        return _tile_wise(magnitude, numbers[0], 1 - zeros)
    if re.fullmatch(r"\d+:\d+:\d+", form):
        return _columns_then_n_of_four(magnitude, *numbers)
    if re.fullmatch(r"\d+:\d+", form):
        return _n_of_m(magnitude, *numbers)
    raise ValueError(f"there is no form of sparsity '{form}'")


def _largest(scores: np.ndarray, share: float) -> np.ndarray:
    """Mark the largest share of an array, as a whole."""
    count = round(share * scores.size)
    marks = np.zeros(scores.size, bool)
    if count:
        marks[np.argpartition(scores.reshape(-1), scores.size - count)[-count:]] = True
    return marks.reshape(scores.shape)


def _blocks(magnitude: np.ndarray, height: int, width: int, share: float) -> np.ndarray:
    rows, columns = magnitude.shape
    tall, wide = -(-rows // height), -(-columns // width)
    padded = np.zeros((tall * height, wide * width), np.float32)
    padded[:rows, :columns] = np.square(magnitude)
    stays = _largest(padded.reshape(tall, height, wide, width).sum(axis=(1, 3)), share)
    return np.repeat(np.repeat(stays, height, 0), width, 1)[:rows, :columns]


def _tile_wise(magnitude: np.ndarray, height: int, share: float) -> np.ndarray:
    """Drop whole outputs; put the others in tiles, and drop whole inputs of each.

    Both steps cut the same share, over all tiles together, so that tiles differ in what they keep.

    C. Guo et al., "Accelerating Sparse DNN Models without Hardware-Support via Tile-Wise
    Sparsity", SC 2020.
    """
    each = float(np.sqrt(share))
    squares = np.square(magnitude)
    rows = np.flatnonzero(_largest(squares.sum(axis=1), each))
    tiles = [rows[first : first + height] for first in range(0, len(rows), height)]
    stays = _largest(np.stack([squares[tile].mean(axis=0) for tile in tiles]), each)
    marks = np.zeros(magnitude.shape, bool)
    for tile, columns in zip(tiles, stays, strict=True):
        marks[np.ix_(tile, np.flatnonzero(columns))] = True
    return marks


def _n_of_m(magnitude: np.ndarray, n: int, m: int) -> np.ndarray:
    rows, columns = magnitude.shape
    grouped = magnitude.reshape(rows, columns // m, m)
    order = np.argpartition(grouped, m - n, axis=2)
    marks = np.zeros(grouped.shape, bool)
    np.put_along_axis(marks, order[:, :, m - n :], True, axis=2)
    return marks.reshape(magnitude.shape)


def _columns_then_n_of_four(magnitude: np.ndarray, v: int, n: int, m: int) -> np.ndarray:
    """Keep four columns of every block of V x M, and N of these four in every row.

    R. L. Castro et al., "VENOM: A Vectorized N:M Format for Unleashing the Power of Sparse Tensor
    Cores", SC 2023.
    """
    rows, columns = magnitude.shape
    blocks = magnitude.reshape(rows // v, v, columns // m, m)
    order = np.argsort(-np.square(blocks).sum(axis=1), axis=2, kind="stable")
    four = np.sort(order[:, :, :4], axis=2)[:, None]
    chosen = np.take_along_axis(blocks, np.broadcast_to(four, (*blocks.shape[:3], 4)), axis=3)
    inner = _n_of_m(chosen.reshape(-1, 4), n, 4).reshape(chosen.shape)
    marks = np.zeros(blocks.shape, bool)
    np.put_along_axis(marks, np.broadcast_to(four, chosen.shape), inner, axis=3)
    return marks.reshape(magnitude.shape)


def _matmuls(
    shapes: Sequence[tuple[int, int, int]],
    group: str,
    form: str,
    zeros: float,
    kind: str,
    dtype: str = "float16",
) -> tuple[Case, ...]:
    return tuple(
        Case(group, MatmulGeometry(m, k, n), dtype, form, zeros, kind) for m, k, n in shapes
    )


def _conv(
    in_channels: int, out_channels: int, size: int, kernel: int, stride: int = 1
) -> Conv2dGeometry:
    return Conv2dGeometry(
        batch=32,
        in_channels=in_channels,
        in_height=size,
        in_width=size,
        out_channels=out_channels,
        kernel=(kernel, kernel),
        strides=(stride, stride),
        padding=(kernel // 2,) * 4,
    )


def _convs(
    layers: Sequence[tuple[int, ...]], group: str, form: str, zeros: float, kind: str, dtype: str
) -> tuple[Case, ...]:
    return tuple(Case(group, _conv(*layer), dtype, form, zeros, kind) for layer in layers)


# Output features, input features, tokens: the layers of BERT-base at 100 sequences of 128 tokens.
BERT = ((768, 768, 12_800), (3072, 768, 12_800), (768, 3072, 12_800))
LARGE = ((4096, 4096, 4096), (8192, 8192, 4096))
DECODED = ((4096, 4096), (7168, 7168), (28_672, 7168))
TOKENS = (8, 16, 32, 64)

# Input channels, output channels, size, kernel, stride. The second to fifth convolution of AlexNet,
# without its groups; 3x3 and 5x5 of the inception modules 3a to 5b of GoogLeNet; ResNet-50.
ALEXNET = ((96, 256, 27, 5), (256, 384, 13, 3), (384, 384, 13, 3), (384, 256, 13, 3))
GOOGLENET = (
    (96, 128, 28, 3),
    (16, 32, 28, 5),
    (128, 192, 28, 3),
    (32, 96, 28, 5),
    (96, 208, 14, 3),
    (16, 48, 14, 5),
    (112, 224, 14, 3),
    (24, 64, 14, 5),
    (128, 256, 14, 3),
    (144, 288, 14, 3),
    (32, 64, 14, 5),
    (160, 320, 14, 3),
    (32, 128, 14, 5),
    (160, 320, 7, 3),
    (32, 128, 7, 5),
    (192, 384, 7, 3),
    (48, 128, 7, 5),
)
RESNET_3X3 = (
    (64, 64, 56, 3),
    (128, 128, 28, 3),
    (256, 256, 14, 3),
    (512, 512, 7, 3),
    (128, 128, 56, 3, 2),
    (256, 256, 28, 3, 2),
    (512, 512, 14, 3, 2),
)
RESNET_1X1 = (
    (64, 64, 56, 1),
    (64, 256, 56, 1),
    (256, 64, 56, 1),
    (256, 128, 56, 1),
    (128, 512, 28, 1),
    (512, 128, 28, 1),
    (512, 256, 28, 1),
    (256, 1024, 14, 1),
    (1024, 256, 14, 1),
    (1024, 512, 14, 1),
    (512, 2048, 7, 1),
    (2048, 512, 7, 1),
    (256, 512, 56, 1, 2),
    (512, 1024, 28, 1, 2),
    (1024, 2048, 14, 1, 2),
)
CONVOLUTIONS = {"alexnet": ALEXNET, "googlenet": GOOGLENET, "resnet50": RESNET_3X3}

# Unstructured float32 on tensor cores, and on CUDA cores; convolutions on CUDA cores are direct.
FLOAT32 = {"unstructured": "two_four", "cuda-cores": "row_tiles"}
CONVOLVED = {"implicit": "two_four", "direct": "row_tiles"}

_THREE = (0.8, 0.9, 0.95)

TABLE: tuple[Case, ...] = (
    *_matmuls(BERT, "tile-wise", "tile-wise:128", 0.75, "tile_wise"),
    *_matmuls((*LARGE, *BERT), "2:4", "2:4", 0.5, "two_four"),
    *_matmuls((*LARGE, *BERT), "v:n:m", "64:2:8", 0.75, "two_four"),
    *_matmuls((*LARGE, *BERT), "v:n:m", "64:2:16", 0.875, "two_four"),
    *(
        case
        for size, zeros in itertools.product(("32x32", "16x16", "16x1"), _THREE)
        for case in _matmuls(
            (LARGE[0], *BERT), "block", f"block:{size}", zeros, "tile_wise"
        )
    ),
    *(
        case
        for (group, kind), zeros in itertools.product(FLOAT32.items(), _THREE)
        for case in _matmuls(BERT, group, "unstructured", zeros, kind, "float32")
    ),
    *(
        case
        for zeros, n in itertools.product((0.7, 0.8), TOKENS)
        for case in _matmuls(
            [(m, k, n) for m, k in DECODED], "decode", "unstructured", zeros, "bitmap_tiles"
        )
    ),
    *(
        case
        for (network, layers), (group, kind), zeros in itertools.product(
            CONVOLUTIONS.items(), CONVOLVED.items(), _THREE
        )
        for case in _convs(layers, f"{group}-{network}", "unstructured", zeros, kind, "float32")
    ),
    *_convs(RESNET_1X1, "2:4-1x1", "2:4", 0.5, "two_four", "float16"),
)  # fmt: skip

# A layer of next to no work: what calling costs. It is built along with whatever else is.
OVERHEAD = Case("overhead", MatmulGeometry(32, 32, 32), "float32", "unstructured", 0.9, "row_tiles")


def file_cases(path: Path, tokens: int) -> tuple[Case, ...]:
    """Make cases of a matrix of DLMC, as unstructured float32 has them.

    Raises
    ------
    InputError
        When the file is none of DLMC.
    """
    mask = read_smtx(path)
    shape = (*mask.shape, tokens)
    zeros = round(1 - float(mask.mean()), 4)
    return tuple(
        case
        for group, kind in FLOAT32.items()
        for case in _matmuls(
            [shape], f"smtx-{group}", f"smtx:{path.resolve()}", zeros, kind, "float32"
        )
    )


def matching(pattern: str | None) -> list[Case]:
    """List the cases whose name fits a pattern (`fnmatch`) or begins with it."""
    if not pattern:
        return list(TABLE)
    return [
        case
        for case in TABLE
        if fnmatch.fnmatchcase(case.name, pattern) or case.name.startswith(pattern)
    ]
