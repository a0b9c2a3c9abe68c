"""Two-dimensional convolutions with a constant weight."""

from __future__ import annotations

from typing import Any

from ..workload import Conv2dGeometry
from .base import Operator, Recognised, static


def _recognise(call: Any, weight_shape: tuple[int, ...]) -> Recognised:
    attrs = call.attrs
    layouts = (attrs.data_layout, attrs.kernel_layout, attrs.out_layout or attrs.data_layout)
    if layouts != ("NCHW", "OIHW", "NCHW"):
        return Recognised(None, f"layout {'/'.join(layouts)}; only NCHW/OIHW is compiled")
    batch, channels, height, width = (static(extent) for extent in call.args[0].ty.shape)
    if channels is None or height is None or width is None:
        return Recognised(None, "the image size is symbolic; fix it with a shape")
    geometry = Conv2dGeometry(
        batch=batch,
        in_channels=channels,
        in_height=height,
        in_width=width,
        out_channels=weight_shape[0],
        kernel=(weight_shape[2], weight_shape[3]),
        strides=_pair(attrs.strides),
        padding=_sides(attrs.padding),
        dilation=_pair(attrs.dilation),
        groups=int(attrs.groups),
    )
    if batch == 0 or geometry.pixels <= 0:
        return Recognised(None, "the convolution has no output pixels")
    return Recognised(geometry)


def _pair(values: Any) -> tuple[int, int]:
    numbers = [int(value) for value in values]
    return (numbers[0], numbers[-1])


def _sides(values: Any) -> tuple[int, int, int, int]:
    numbers = [int(value) for value in values]
    if len(numbers) == 1:
        numbers = numbers * 4
    elif len(numbers) == 2:
        numbers = numbers * 2
    return (numbers[0], numbers[1], numbers[2], numbers[3])


CONV2D = Operator("conv2d", "relax.nn.conv2d", _recognise, lambda rank: 1)
