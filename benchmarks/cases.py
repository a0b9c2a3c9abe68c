"""The shapes and densities that `kernels.py` measures, by section."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pruned_weights import pruned_conv, pruned_matrix
from smtx import FILE_GROUP, read_smtx

from tvm_sparse.runtime import aligned_empty
from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload


@dataclass(frozen=True)
class MatmulCase:
    """Y[n, m] = X[n, k] W[m, k]^T; `group` is what geometric means are taken over."""

    m: int
    k: int
    n: int
    group: str = "shapes"

    @property
    def name(self) -> str:
        """The shape as the tables write it: rows x columns x tokens."""
        return f"{self.m}x{self.k}x{self.n}"

    @property
    def columns(self) -> int:
        """Columns of the product's result, seen as [outputs, columns]."""
        return self.n

    def workload(self, threads: int = 1) -> Workload:
        """Describe the layer to the kernel templates."""
        return Workload("matmul", MatmulGeometry(self.m, self.k, self.n), threads=threads)

    def weight(self, density: float) -> np.ndarray:
        """Return the pruned weight [m, k]."""
        return pruned_matrix(self.m, self.k, 1 - density)

    def input(self) -> np.ndarray:
        """Return the activations [n, k]."""
        return _normal((self.n, self.k))


@dataclass(frozen=True)
class FileCase(MatmulCase):
    """A matmul whose nonzeros lie where a file says; it has one density."""

    file: str = ""

    @property
    def name(self) -> str:
        """The file and the shape."""
        return f"{Path(self.file).stem} {super().name}"

    def weight(self, density: float) -> np.ndarray:
        """Return a weight [m, k] with Gaussian values."""
        values = np.random.default_rng(0).standard_normal((self.m, self.k), np.float32)
        return np.where(read_smtx(self.file), values, np.float32(0))


def file_case(path: str | os.PathLike[str], n: int) -> tuple[FileCase, float]:
    """Make a case of a matrix of DLMC and `n` tokens, and tell its density.

    Raises
    ------
    InputError
        When the file is none of DLMC.
    """
    mask = read_smtx(path)
    return FileCase(*mask.shape, n, FILE_GROUP, str(Path(path).resolve())), float(mask.mean())


@dataclass(frozen=True)
class ConvCase:
    """A "same" convolution of square images, bias and activation left out."""

    ic: int
    oc: int
    size: int
    kernel: int
    stride: int = 1
    batch: int = 1
    group: str = "resnet50"

    @property
    def name(self) -> str:
        """The layer as the tables write it."""
        stride = f"/{self.stride}" if self.stride > 1 else ""
        layer = f"{self.kernel}x{self.kernel}{stride} {self.ic}->{self.oc}@{self.size}"
        return f"{layer} b{self.batch}" if self.batch > 1 else layer

    @property
    def geometry(self) -> Conv2dGeometry:
        """The operator."""
        pad = (self.kernel // 2,) * 4
        return Conv2dGeometry(
            self.batch,
            self.ic,
            self.size,
            self.size,
            self.oc,
            (self.kernel, self.kernel),
            strides=(self.stride, self.stride),
            padding=pad,
        )

    @property
    def columns(self) -> int:
        """Columns of the product's result, seen as [outputs, columns]."""
        return self.batch * self.geometry.pixels

    def workload(self, threads: int = 1) -> Workload:
        """Describe the layer to the kernel templates."""
        return Workload("conv2d", self.geometry, threads=threads)

    def weight(self, density: float) -> np.ndarray:
        """Return the pruned weight as OIHW."""
        return pruned_conv(self.oc, self.ic, self.kernel, 1 - density)

    def input(self) -> np.ndarray:
        """Return images as NCHW."""
        return _normal((self.batch, self.ic, self.size, self.size))


Case = MatmulCase | ConvCase


@dataclass(frozen=True)
class Section:
    """Cases that are measured by one process, at the same densities.

    Attributes
    ----------
    target : str
        What our kernels are compiled for.
    lanes : int
        Vector width of the bar in float32; 0 for the machine's own.
    threads : int
        Threads, and cores to pin them to.
    """

    name: str
    cases: tuple[Case, ...]
    densities: tuple[float, ...]
    target: str = "native"
    lanes: int = 0
    threads: int = 1


def _normal(shape: tuple[int, ...]) -> np.ndarray:
    array = aligned_empty(shape, np.dtype(np.float32))
    array[...] = np.random.default_rng(1).standard_normal(shape)
    return array


def _convs(
    layers: Sequence[tuple[int, int, int]], kernel: int, group: str, stride: int = 1
) -> tuple[ConvCase, ...]:
    return tuple(ConvCase(ic, oc, size, kernel, stride, 1, group) for ic, oc, size in layers)


BERT = (
    MatmulCase(768, 768, 128, "bert"),
    MatmulCase(3072, 768, 128, "bert"),
    MatmulCase(768, 3072, 128, "bert"),
)
MATMULS = (
    *BERT,
    MatmulCase(512, 512, 192),
    MatmulCase(256, 1024, 192),
    MatmulCase(64, 256, 3136),
    MatmulCase(1024, 1024, 64),
    MatmulCase(2048, 512, 48),
    MatmulCase(768, 768, 100, "tails"),
    MatmulCase(771, 768, 128, "tails"),
    MatmulCase(768, 769, 128, "tails"),
    MatmulCase(771, 769, 100, "tails"),
)
FEW = tuple(
    MatmulCase(m, k, n, "few")
    for m, k in ((768, 768), (3072, 768), (768, 3072))
    for n in (*range(1, 17), 32)
)

RESNET_1X1 = _convs(
    [
        (64, 256, 56),
        (256, 64, 56),
        (128, 512, 28),
        (512, 128, 28),
        (256, 1024, 14),
        (1024, 256, 14),
        (512, 2048, 7),
        (2048, 512, 7),
    ],
    1,
    "resnet50 1x1",
)
RESNET_3X3 = _convs(
    [(64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7)], 3, "resnet50 3x3"
)
RESNET_STRIDE_2 = (
    *_convs([(128, 128, 56), (256, 256, 28), (512, 512, 14)], 3, "resnet50 stride 2", 2),
    *_convs([(256, 512, 56), (512, 1024, 28), (1024, 2048, 14)], 1, "resnet50 stride 2", 2),
)
MOBILENET = _convs(
    [
        (32, 64, 112),
        (64, 128, 56),
        (128, 128, 56),
        (128, 256, 28),
        (256, 256, 28),
        (256, 512, 14),
        (512, 512, 14),
        (512, 1024, 7),
        (1024, 1024, 7),
    ],
    1,
    "mobilenet 1x1",
)
VGG = _convs(
    [
        (64, 64, 224),
        (64, 128, 112),
        (128, 128, 112),
        (128, 256, 56),
        (256, 256, 56),
        (256, 512, 28),
        (512, 512, 28),
        (512, 512, 14),
    ],
    3,
    "vgg 3x3",
)
_ONE_IMAGE = (*RESNET_1X1, *RESNET_3X3, *RESNET_STRIDE_2, *MOBILENET, *VGG)
CONVS = tuple(
    ConvCase(c.ic, c.oc, c.size, c.kernel, c.stride, batch, c.group)
    for batch in (1, 8)
    for c in _ONE_IMAGE
)

DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)

SECTIONS: dict[str, Section] = {
    "matmul": Section("matmul", MATMULS, DENSITIES),
    "few": Section("few", FEW, DENSITIES),
    "conv": Section("conv", CONVS, (0.3, 0.2, 0.1, 0.05)),
    "threads": Section(
        "threads",
        (*BERT, MatmulCase(768, 768, 384), *RESNET_3X3, *VGG[:3]),
        (0.3, 0.1, 0.05),
        threads=2,
    ),
    "avx2": Section(
        "avx2",
        (*MATMULS[:7], *RESNET_1X1[:2], *RESNET_3X3),
        (0.3, 0.2, 0.1, 0.05),
        target="x86-64-v3",
        lanes=8,
    ),
}

# What --quick keeps of each section: one small case of every kind.
QUICK: dict[str, tuple[Case, ...]] = {
    "matmul": (MatmulCase(256, 256, 64), MatmulCase(77, 65, 20, "tails")),
    "few": (MatmulCase(256, 256, 1, "few"), MatmulCase(256, 256, 16, "few")),
    "conv": (
        ConvCase(32, 32, 14, 3, group="resnet50 3x3"),
        ConvCase(32, 64, 14, 1, batch=2, group="resnet50 1x1"),
        ConvCase(32, 32, 14, 3, 2, group="resnet50 stride 2"),
    ),
    "threads": (MatmulCase(512, 512, 128),),
    "avx2": (MatmulCase(256, 256, 64), ConvCase(32, 32, 14, 3, group="resnet50 3x3")),
}
QUICK_DENSITIES = (0.3, 0.1)
