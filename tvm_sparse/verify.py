"""Hold a compiled model against its dense reference: kernel by kernel, and as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .check import (
    LayerCheck,
    check_layers,
    check_outputs,
    compare,
    half_model_tolerance,
    model_tolerance,
    rounded_bound,
    typed_dot_bound,
)
from .device import CUDA, device_kind
from .dtypes import FLOAT_TYPES, HALF_TYPES, numpy_dtype
from .epilogue_reference import evaluate64
from .errors import CheckError
from .model import Model
from .passes.collect_weights import FusedSite
from .passes.rewrite_weights import KernelCall
from .pipeline import Lowered
from .progress import Progress
from .reference import Capture, Reference, ReferenceRun, random_inputs
from .runtime import CompiledModule

# Multiply-adds of a float64 reference that one layer may cost; beyond, some of its rows are
# checked.
_MACS = 2_000_000_000

# Rows and columns of an image whose size is symbolic: survives five halvings.
_IMAGE = 64


def verify(
    model: Model,
    sites: Sequence[FusedSite],
    lowered: Lowered,
    module: CompiledModule,
    progress: Progress,
) -> dict[str, LayerCheck]:
    """Check every rewritten layer, then the outputs.

    Parameters
    ----------
    model, sites, lowered
        What was compiled.
    module : CompiledModule
        The whole, fresh from the compiler: its library holds the kernels by symbol.

    Returns
    -------
    dict of str to LayerCheck
        By layer name.

    Raises
    ------
    CheckError
        One sentence that names the worst layer.
    """
    inputs = random_inputs(model, symbolic=_image_sizes(model))
    with progress.phase("run the dense reference"):
        reference = _run_reference(model, inputs)
    checks: dict[str, LayerCheck] = {}
    rewritten = [fused for fused in sites if fused.site.binding in lowered.calls]
    with progress.phase("check layers", total=len(rewritten)) as phase:
        for number, fused in enumerate(rewritten):
            phase.step(fused.site.name)
            call = lowered.calls[fused.site.binding]
            capture = reference.captures[fused.site.binding]
            checks[fused.site.name] = _check_layer(model, fused, call, capture, module, number)
    check_layers(list(checks.values()))
    outputs = module(*inputs)
    check_outputs(
        [spec.name for spec in model.outputs],
        outputs if isinstance(outputs, list) else [outputs],
        reference.outputs,
        _tolerance(model, len(rewritten), len(sites) - len(rewritten)),
        layers=list(checks.values()),
    )
    return checks


def _image_sizes(model: Model) -> dict[str, int]:
    """Give symbolic images a size at which strided networks still have pixels at their end."""
    images = [spec.shape for spec in model.inputs if len(spec.shape) == 4]
    names = {size for shape in images for size in shape[2:] if isinstance(size, str)}
    return {name: _IMAGE for name in names if not set(name) & set("+-*/")}


def _run_reference(model: Model, inputs: Sequence[np.ndarray]) -> ReferenceRun:
    try:
        return Reference(model).run(inputs)
    except (RuntimeError, ValueError) as error:
        shapes = ", ".join(str(array.shape) for array in inputs)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckError(
            f"the dense model cannot be run on random inputs of the shapes {shapes} to check the "
            f"compiled one ({lines[0]}); fix symbolic dimensions by shapes, or leave the check out"
        ) from error


def _tolerance(model: Model, kernels: int, others: int) -> float:
    """Tell what the outputs may be off by, after the narrowest weights."""
    types = {str(value.dtype) for value in model.params.values()} & HALF_TYPES
    if not types:
        return model_tolerance(kernels + others)
    narrowest = max(types, key=lambda name: FLOAT_TYPES[name].roundoff)
    return half_model_tolerance(narrowest, kernels, others)


def _check_layer(
    model: Model,
    fused: FusedSite,
    call: KernelCall,
    capture: Capture,
    module: CompiledModule,
    seed: int,
) -> LayerCheck:
    """Run one kernel as it will be shipped; tensors that the epilogue adds are random here.

    The kernel reads the very numbers that the reference read, in the layer's type; its result may
    differ by what float32 does to sums and epilogue, and then by one rounding to that type.
    """
    dtype = fused.site.workload.dtype
    x, shape = _as_kernel_sees(fused, capture.x), _as_kernel_sees(fused, capture.y64).shape
    rng = np.random.default_rng(seed)
    tensors = [
        rng.standard_normal(shape, np.float32).astype(numpy_dtype(dtype))
        for _ in fused.fused.tensors
    ]
    channels = [model.params[name].reshape(-1) for name in fused.fused.channels]
    got = _run_kernel(module, call, x, tensors, shape)

    # Output features are the second axis of a matrix of results, and of images.
    rows = _rows(fused, capture)
    picked = slice(None) if rows is None else rows
    want, magnitude = (_as_kernel_sees(fused, part) for part in capture.reference64(rows))
    is_matmul = fused.site.workload.op == "matmul"
    terms = capture.terms[..., picked] if is_matmul else capture.terms[picked]
    trailing = (1,) * (len(shape) - 2)
    value, bound = evaluate64(
        fused.fused.epilogue,
        want,
        typed_dot_bound(magnitude, terms, dtype, on_tensor_cores=call.on_tensor_cores),
        [vector[picked].reshape(-1, *trailing) for vector in channels],
        [tensor[:, picked] for tensor in tensors],
    )
    return compare(fused.site.name, got[:, picked], value, rounded_bound(value, bound, dtype))


def _as_kernel_sees(fused: FusedSite, array: np.ndarray) -> np.ndarray:
    """Flatten the leading dimensions of a matmul's activations or results."""
    return array.reshape(-1, array.shape[-1]) if fused.site.workload.op == "matmul" else array


def _rows(fused: FusedSite, capture: Capture) -> list[int] | None:
    """Choose the output features to check when all would take too long."""
    geometry = fused.site.workload.geometry
    assert geometry is not None
    features, depth = geometry.weight_shape
    macs = depth * capture.y64.size
    if macs <= _MACS or getattr(geometry, "groups", 1) > 1:
        return None
    count = max(16, features * _MACS // macs)
    return sorted({int(row) for row in np.linspace(0, features - 1, count)})


def _run_kernel(
    module: CompiledModule,
    call: KernelCall,
    x: np.ndarray,
    tensors: Sequence[np.ndarray],
    shape: tuple[int, ...],
) -> np.ndarray:
    """Return what a kernel computes, of it what is this layer's."""
    if call.panels is None:
        result = np.zeros(shape, x.dtype)
        _call_kernel(module, call.symbol, [x, *call.arrays, *call.channels, *tensors], result)
        return result
    rows = []
    for first in range(0, len(x), call.panels.tokens):
        part = slice(first, first + call.panels.tokens)
        packed = [call.panels.pack(array[part]) for array in (x, *tensors)]
        arguments = [packed[0], *call.arrays, *call.channels, *packed[1:]]
        result = np.zeros(call.panels.size(call.features), np.float32)
        _call_kernel(module, call.symbol, arguments, result)
        rows.append(call.panels.unpack(result, call.features))
    return np.concatenate(rows)[:, call.first : call.first + shape[1]]


def _call_kernel(
    module: CompiledModule, symbol: str, arguments: Sequence[np.ndarray], result: np.ndarray
) -> None:
    import tvm

    device = tvm.device("cuda" if device_kind(module.manifest.target) == CUDA else "cpu")
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(array), device) for array in arguments]
    output = tvm.runtime.tensor(result, device)
    module.library.get_function(symbol, query_imports=True)(*tensors, output)
    np.copyto(result, output.numpy())
