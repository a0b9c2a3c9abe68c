"""What a kernel has to compute: the geometry of one operator, and what is fused behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class MatmulGeometry:
    """Y[n, m] = sum_k X[n, k] W[m, k]: `n` tokens, `m` output features, `k` input features.

    Attributes
    ----------
    m, k : int
        Rows and columns of the weight, seen as (output features, input features).
    n : int or None
        Product of all leading dimensions of the activations; None when it is symbolic.
    layout : str
        How the activations lie: "rows" is [n, k] and [n, m]; "panels" is what kernels for
        processors work on, `tvm_sparse.panels.Panels` as wide as the kernel's tile; "features" is
        [k, n] and [m, n].
    """

    m: int
    k: int
    n: int | None
    layout: Literal["rows", "panels", "features"] = "rows"

    @property
    def weight_shape(self) -> tuple[int, int]:
        """The weight as the matrix that formats pack: (rows, columns)."""
        return (self.m, self.k)

    def macs(self, columns: int | None = None) -> int:
        """Multiply-adds of the dense operator; `columns` replaces a symbolic `n`."""
        return self.m * self.k * (self.n if self.n is not None else columns or 1)


@dataclass(frozen=True)
class Conv2dGeometry:
    """A convolution in NCHW with OIHW weights.

    Attributes
    ----------
    batch : int or None
        Images per call; None when symbolic.
    padding : tuple of int
        (top, left, bottom, right).
    """

    batch: int | None
    in_channels: int
    in_height: int
    in_width: int
    out_channels: int
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def out_height(self) -> int:
        """Rows of the output image."""
        reach = (self.kernel[0] - 1) * self.dilation[0] + 1
        return (self.in_height + self.padding[0] + self.padding[2] - reach) // self.strides[0] + 1

    @property
    def out_width(self) -> int:
        """Columns of the output image."""
        reach = (self.kernel[1] - 1) * self.dilation[1] + 1
        return (self.in_width + self.padding[1] + self.padding[3] - reach) // self.strides[1] + 1

    @property
    def pixels(self) -> int:
        """Output pixels of one image and channel."""
        return self.out_height * self.out_width

    @property
    def weight_shape(self) -> tuple[int, int]:
        """The weight as the matrix that formats pack: (outputs, inputs of a group x taps)."""
        return (
            self.out_channels,
            self.in_channels // self.groups * self.kernel[0] * self.kernel[1],
        )

    @property
    def is_depthwise(self) -> bool:
        """One input channel a group: no sum over channels."""
        return self.groups == self.in_channels and self.groups > 1

    def macs(self, batch: int | None = None) -> int:
        """Multiply-adds of the dense operator; `batch` replaces a symbolic one."""
        rows, columns = self.weight_shape
        return rows * columns * self.pixels * (self.batch if self.batch is not None else batch or 1)


Geometry = MatmulGeometry | Conv2dGeometry

RefKind = Literal["acc", "node", "scalar", "channel", "tensor"]


@dataclass(frozen=True)
class EpilogueRef:
    """An operand of a fused operation.

    `kind` is "acc" (the operator's own result), "node" (an earlier epilogue operation, by index),
    "scalar" (a constant, by `value`), "channel" (the index-th vector with one element per output
    channel) or "tensor" (the index-th tensor of the output's shape, for example a residual).
    """

    kind: RefKind
    index: int = 0
    value: float = 0.0


@dataclass(frozen=True)
class EpilogueOp:
    """One fused elementwise operation; `name` is a key of `schedules.epilogue.EMITTERS`."""

    name: str
    inputs: tuple[EpilogueRef, ...]


@dataclass(frozen=True)
class Epilogue:
    """A graph of elementwise operations on the result; the last one's value is stored."""

    ops: tuple[EpilogueOp, ...] = ()
    channels: int = 0
    tensors: int = 0

    def describe(self) -> str:
        """Name the fused operations for reports, for example ``add+relu``."""
        return "+".join(op.name for op in self.ops)


@dataclass(frozen=True)
class Workload:
    """All that a kernel template needs but the weight's values; part of a record's key."""

    op: str
    geometry: Geometry | None
    dtype: str = "float32"
    epilogue: Epilogue = field(default_factory=Epilogue)
    threads: int = 1
