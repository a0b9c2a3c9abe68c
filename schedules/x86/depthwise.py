"""Depthwise convolution in NCHW: each output channel reads one input channel."""

from __future__ import annotations

from tvm import tirx

from ...targets import X86Machine
from ...workload import Conv2dGeometry, Epilogue
from .dense_kernel import UnsupportedShapeError
from .direct_conv import direct_conv2d


def depthwise_conv2d(
    geometry: Conv2dGeometry, machine: X86Machine, epilogue: Epilogue | None = None
) -> tirx.PrimFunc:
    """Build a depthwise convolution with its epilogue.

    Parameters
    ----------
    geometry : Conv2dGeometry
        Groups equal to the input channels; any whole number of output channels per group.
    machine : X86Machine
        Gives vector width, registers and threads.
    epilogue : Epilogue, optional
        Elementwise operations on the result.

    Returns
    -------
    PrimFunc
        Parameters (x [n, c, h, w], w [o, 1, kh, kw], one vector [o] per epilogue channel, one
        tensor of the result's shape per epilogue tensor, y), float32.

    Raises
    ------
    UnsupportedShapeError
        When the convolution is not depthwise, its stride along the row is over 2, or it is empty.
    """
    if geometry.groups != geometry.in_channels:
        raise UnsupportedShapeError("the convolution is not depthwise")
    return direct_conv2d(geometry, machine, epilogue)
