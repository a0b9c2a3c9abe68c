"""Matrix products and convolutions in float64, piece by piece: what kernels are held against."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

# Weights and patches are widened to float64 in pieces of at most this many bytes.
_PIECE_BYTES = 32 << 20


@dataclass(frozen=True)
class ConvAttributes:
    """How a convolution in NCHW with OIHW weights moves over its input.

    Attributes
    ----------
    padding : tuple of int
        (top, left, bottom, right).
    """

    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def matmul64(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Multiply in float64, widening a few columns of the weight at a time."""
    x = x.astype(np.float64)
    if weight.ndim < 2:
        return np.matmul(x, weight.astype(np.float64))
    width = _piece(8 * weight.size // max(weight.shape[-1], 1))
    pieces = [
        np.matmul(x, weight[..., start : start + width].astype(np.float64))
        for start in range(0, max(weight.shape[-1], 1), width)
    ]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)


def conv2d64(x: np.ndarray, weight: np.ndarray, conv: ConvAttributes) -> np.ndarray:
    """Convolve in float64: NCHW by OIHW, as a matrix product over patches of a few rows at a time.

    Parameters
    ----------
    x : numpy.ndarray
        (batch, channels, height, width).
    weight : numpy.ndarray
        (output channels, channels per group, height, width).

    Returns
    -------
    numpy.ndarray
        (batch, output channels, height, width) in float64.
    """
    windows = _windows(x, weight.shape[2:], conv)
    batch, channels, height, width = windows.shape[:4]
    groups, out_channels = conv.groups, weight.shape[0]
    matrix = weight.astype(np.float64).reshape(groups, out_channels // groups, -1)
    result = np.empty((batch, out_channels, height, width))
    step = _piece(8 * width * channels * weight.shape[2] * weight.shape[3])
    for image, start in itertools.product(range(batch), range(0, height, step)):
        patch = windows[image, :, start : start + step].astype(np.float64)
        rows = patch.shape[1]
        # (channels, rows, width, taps) -> (groups, channels per group x taps, rows x width)
        columns = patch.transpose(0, 3, 4, 1, 2).reshape(groups, matrix.shape[2], rows * width)
        product = np.matmul(matrix, columns)
        result[image, :, start : start + step] = product.reshape(out_channels, rows, width)
    return result


def _windows(x: np.ndarray, kernel: tuple[int, ...], conv: ConvAttributes) -> np.ndarray:
    """View x as (batch, channels, out height, out width, kernel height, kernel width)."""
    top, left, bottom, right = conv.padding
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    reach = [(size - 1) * step + 1 for size, step in zip(kernel, conv.dilation, strict=True)]
    image_axes: Any = (2, 3)  # older stubs of NumPy know one axis only
    view = np.lib.stride_tricks.sliding_window_view(x, reach, axis=image_axes)
    (down, across), (tap_down, tap_across) = conv.strides, conv.dilation
    return view[:, :, ::down, ::across, ::tap_down, ::tap_across]


def _piece(bytes_each: int) -> int:
    return max(1, _PIECE_BYTES // max(bytes_each, 1))
