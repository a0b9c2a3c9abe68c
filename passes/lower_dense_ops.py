"""Replace operators without a weight by calls of this package's x86 kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm_ffi import structural_equal

from ..schedules.x86.batch_matmul import batch_matmul
from ..schedules.x86.dense_kernel import Dim, UnsupportedShapeError
from ..schedules.x86.direct_conv import direct_conv2d
from ..schedules.x86.layer_norm import layer_norm
from ..schedules.x86.pooling import Window, pool2d
from ..schedules.x86.reduce import reduce_last
from ..schedules.x86.softmax import softmax
from ..schedules.x86.transpose import permute_dims
from ..schedules.x86.upsample import upsample_nearest
from ..targets import X86Machine
from ..workload import Conv2dGeometry


@dataclass
class Site:
    """One call seen by a rule: shapes in the templates' terms, equal symbols as equal names."""

    call: Any
    machine: X86Machine
    _names: list[Any] = field(default_factory=list)

    def shape(self, expr: Any) -> list[Dim]:
        """Give the shape of a float32 tensor.

        Raises
        ------
        UnsupportedShapeError
            When it is no tensor, holds no float32, has no known rank, or no elements.
        """
        kind = expr.ty
        if not isinstance(kind, relax.TensorType) or str(kind.dtype) != "float32":
            raise UnsupportedShapeError("only float32 tensors have kernels")
        if not isinstance(kind.shape, relax.ShapeExpr):
            raise UnsupportedShapeError("the shape is not known")
        shape = [self._dim(value) for value in kind.shape.values]
        if 0 in shape:
            raise UnsupportedShapeError("tensors without elements are left to TVM")
        return shape

    def _dim(self, value: Any) -> Dim:
        if isinstance(value, tirx.IntImm):
            return int(value.value)
        for number, known in enumerate(self._names):
            if structural_equal(known, value):
                return f"d{number}"
        self._names.append(value)
        return f"d{len(self._names) - 1}"

    @property
    def inputs(self) -> list[list[Dim]]:
        """Shapes of all arguments."""
        return [self.shape(arg) for arg in self.call.args]

    @property
    def output(self) -> list[Dim]:
        """Shape of the result."""
        return self.shape(self.call)


@dataclass(frozen=True)
class Kernel:
    """What a call becomes: a template with its arguments, and which arguments of the call it gets.

    `key` tells kernels apart; equal keys share one function.
    """

    template: Callable[..., Any]
    arguments: tuple[Any, ...]
    operands: tuple[int, ...] = (0,)

    @property
    def key(self) -> tuple[str, str]:
        """Name the template and all its arguments."""
        return (self.template.__name__, repr(self.arguments))


Rule = Callable[[Site], Kernel]


def _last_axes(rank: int, axes: Sequence[Any]) -> int:
    """Count the axes when they are the last ones.

    Raises
    ------
    UnsupportedShapeError
        When they are not.
    """
    chosen = sorted(int(axis) % rank for axis in axes)
    if chosen != list(range(rank - len(chosen), rank)):
        raise UnsupportedShapeError(f"axes {chosen} of {rank} are not the last ones")
    return len(chosen)


def _softmax(kind: str) -> Rule:
    def rule(site: Site) -> Kernel:
        shape = site.inputs[0]
        _last_axes(len(shape), [site.call.attrs.axis])
        return Kernel(softmax, (tuple(shape), site.machine, kind))

    return rule


def _norm(kind: str) -> Rule:
    def rule(site: Site) -> Kernel:
        attrs, shapes = site.call.attrs, site.inputs
        axes = _last_axes(len(shapes[0]), attrs.axes)
        for parameter in shapes[1:]:
            if parameter != shapes[0][len(shapes[0]) - axes :]:
                raise UnsupportedShapeError("factor and summand have another shape")
        gamma = kind == "rms_norm" or bool(attrs.scale)
        beta = kind == "layer_norm" and bool(attrs.center)
        operands = (0, *((1,) if gamma else ()), *((2,) if beta else ()))
        arguments = (tuple(shapes[0]), axes, site.machine, float(attrs.epsilon), kind, gamma, beta)
        return Kernel(layer_norm, arguments, operands)

    return rule


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _pool(kind: str) -> Rule:
    def rule(site: Site) -> Kernel:
        attrs, shape = site.call.attrs, site.inputs[0]
        if attrs.layout != "NCHW" or (attrs.out_layout or "NCHW") != "NCHW":
            raise UnsupportedShapeError(f"pooling in the layout {attrs.layout} has no kernel")
        if not all(isinstance(dim, int) for dim in shape[1:]):
            raise UnsupportedShapeError("images of unknown size are left to TVM")
        kernel, strides = _ints(attrs.pool_size), _ints(attrs.strides)
        padding, dilation = _ints(attrs.padding), _ints(attrs.dilation)
        window = Window(
            (kernel[0], kernel[1]),
            (strides[0], strides[1]),
            (padding[0], padding[1], padding[2], padding[3]),
            (dilation[0], dilation[1]),
            bool(attrs.ceil_mode),
        )
        whole = tuple(shape[2:]) == window.kernel and not any(padding) and shape[2:] != [1, 1]
        if kind == "avg" and whole and dilation == (1, 1):
            return Kernel(reduce_last, (tuple(shape), 2, tuple(site.output), site.machine, "mean"))
        expected = [window.out_size(axis, int(shape[2 + axis])) for axis in (0, 1)]
        if site.output[2:] != expected:
            raise UnsupportedShapeError("TVM rounds the size of this pooling in another way")
        include = bool(attrs.count_include_pad)
        return Kernel(pool2d, (*shape, window, site.machine, kind, include))

    return rule


def _adaptive(site: Site) -> Kernel:
    shape = site.inputs[0]
    if site.call.attrs.layout != "NCHW" or site.output[2:] != [1, 1]:
        raise UnsupportedShapeError("only pooling to one pixel has a kernel")
    return Kernel(reduce_last, (tuple(shape), 2, tuple(site.output), site.machine, "mean"))


def _reduce(kind: str) -> Rule:
    def rule(site: Site) -> Kernel:
        shape, axis = site.inputs[0], site.call.attrs.axis
        axes = _last_axes(len(shape), range(len(shape)) if axis is None else axis)
        arguments = (tuple(shape), axes, tuple(site.output), site.machine, kind)
        return Kernel(reduce_last, arguments)

    return rule


def _permute(site: Site) -> Kernel:
    shape, axes = site.inputs[0], site.call.attrs.axes
    order = _ints(axes) if axes is not None else tuple(reversed(range(len(shape))))
    order = tuple(axis % len(shape) for axis in order)
    return Kernel(permute_dims, (tuple(shape), order, tuple(site.output), site.machine))


# Where coordinates are rounded so that pixel `i` of the result is pixel `i // factor` of the image,
# when it grows by a whole factor.
_REPEATS = {
    ("half_pixel", "round"),
    ("half_pixel", "round_prefer_ceil"),
    ("half_pixel", "round_prefer_floor"),
    ("asymmetric", "floor"),
    ("tf_half_pixel_for_nn", "floor"),
}


def _resize(site: Site) -> Kernel:
    attrs, shape, output = site.call.attrs, site.shape(site.call.args[0]), site.output
    rounding = (attrs.coordinate_transformation_mode, attrs.rounding_method)
    if attrs.method != "nearest_neighbor" or rounding not in _REPEATS:
        raise UnsupportedShapeError(f"resizing by {attrs.method}, {rounding}, has no kernel")
    sizes = [dim for dim in (*shape[2:], *output[2:]) if isinstance(dim, int)]
    if attrs.layout != "NCHW" or len(sizes) != 4:
        raise UnsupportedShapeError("images of unknown size or another layout are left to TVM")
    height, width, out_height, out_width = sizes
    if out_height % height or out_width % width:
        raise UnsupportedShapeError("only growing by a whole factor has a kernel")
    factors = out_height // height, out_width // width
    return Kernel(upsample_nearest, (*shape, factors, site.machine))


def _matmul(site: Site) -> Kernel:
    left, right = site.inputs
    return Kernel(batch_matmul, (tuple(left), tuple(right), site.machine), (0, 1))


def _conv2d(site: Site) -> Kernel:
    attrs, (image, weight) = site.call.attrs, site.inputs
    if (attrs.data_layout, attrs.kernel_layout) != ("NCHW", "OIHW") or (
        attrs.out_layout or "NCHW"
    ) != "NCHW":
        raise UnsupportedShapeError(f"convolution in the layout {attrs.data_layout} has no kernel")
    sizes = [dim for dim in (*image[1:], *weight) if isinstance(dim, int)]
    if len(sizes) != 7:
        raise UnsupportedShapeError("images of unknown size are left to TVM")
    channels, height, width, out_channels, _, kernel_height, kernel_width = sizes
    strides, padding, dilation = _ints(attrs.strides), _ints(attrs.padding), _ints(attrs.dilation)
    geometry = Conv2dGeometry(
        image[0] if isinstance(image[0], int) else None,
        channels,
        height,
        width,
        out_channels,
        (kernel_height, kernel_width),
        (strides[0], strides[1]),
        (padding[0], padding[1], padding[2], padding[3]),
        (dilation[0], dilation[1]),
        int(attrs.groups),
    )
    return Kernel(direct_conv2d, (geometry, site.machine), (0, 1))


# Operator -> how its kernel is chosen. What is not here, or is refused, stays with TVM.
RULES: dict[str, Rule] = {
    "relax.nn.softmax": _softmax("softmax"),
    "relax.nn.log_softmax": _softmax("log_softmax"),
    "relax.nn.layer_norm": _norm("layer_norm"),
    "relax.nn.rms_norm": _norm("rms_norm"),
    "relax.nn.max_pool2d": _pool("max"),
    "relax.nn.avg_pool2d": _pool("avg"),
    "relax.nn.adaptive_avg_pool2d": _adaptive,
    "relax.mean": _reduce("mean"),
    "relax.sum": _reduce("sum"),
    "relax.max": _reduce("max"),
    "relax.min": _reduce("min"),
    "relax.permute_dims": _permute,
    "relax.image.resize2d": _resize,
    "relax.matmul": _matmul,
    # Those with a weight that is worth more have been rewritten before.
    "relax.nn.conv2d": _conv2d,
}


@tvm.transform.module_pass(opt_level=0, name="LowerDenseOps")
class LowerDenseOps:
    """Rewrite operators without a weight into `call_tir` of x86 kernels; the rest is untouched.

    Parameters
    ----------
    machine : X86Machine
        Gives vector width, registers and threads.
    """

    def __init__(self, machine: X86Machine) -> None:
        self.machine = machine

    def transform_module(
        self, mod: tvm.IRModule, context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Rewrite every Relax function of the module."""
        rewriter = _Rewriter(mod, self.machine)
        for name, function in mod.functions_items():
            if isinstance(function, relax.Function):
                rewriter.builder_.update_func(name, rewriter.visit_expr(function))
        return rewriter.builder_.get()


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, machine: X86Machine) -> None:
        super().__init__(mod)
        self.machine = machine
        self.functions: dict[tuple[str, str], Any] = {}

    def visit_call_(self, call: Any) -> Any:
        """Replace the call when a rule takes it."""
        call = self.visit_expr_post_order(call)
        if not isinstance(call.op, tvm.ir.Op) or call.op.name not in RULES:
            return call
        try:
            kernel = RULES[call.op.name](Site(call, self.machine))
            if kernel.key not in self.functions:
                function = kernel.template(*kernel.arguments)
                name = str(function.attrs["tvm_sparse.dense"])
                self.functions[kernel.key] = self.builder_.add_func(function, name)
        except UnsupportedShapeError:
            return call
        operands = [call.args[number] for number in kernel.operands]
        return relax.call_tir(self.functions[kernel.key], operands, out_ty=call.ty)
