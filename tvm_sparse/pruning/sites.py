"""A weight that can be pruned: the layer it belongs to, and its values as output rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PrunableLayer:
    """A layer whose weight can be pruned.

    Attributes
    ----------
    name : str
        The ONNX node or PyTorch module (several, joined by a comma, when they share the weight).
    op : str
        "Conv", "Gemm" or "MatMul".
    shape : tuple of int
        The weight as it is stored.
    groups : int
        Groups of a convolution.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    groups: int = 1

    @property
    def is_depthwise(self) -> bool:
        """A convolution with one input channel a group."""
        return self.op == "Conv" and self.groups > 1 and self.shape[1] == 1


@dataclass(frozen=True)
class Site:
    """One weight.

    Attributes
    ----------
    layer : PrunableLayer
        Whose weight it is.
    root : str
        Its own name in the model.
    view : numpy.ndarray
        [output rows, input channels of a group, taps], writing into the stored weight.
    arrange : callable
        Rearranges any array of the stored shape as `view` is.
    """

    layer: PrunableLayer
    root: str
    view: np.ndarray
    arrange: Callable[[np.ndarray], np.ndarray]

    @property
    def dims(self) -> tuple[int, ...]:
        """Output and input channels, and a convolution's kernel axes."""
        kernel = self.layer.shape[2:] if self.layer.op == "Conv" else ()
        return (*self.view.shape[:2], *kernel)
