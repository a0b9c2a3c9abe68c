"""Hold a compiled model against its dense reference: kernel by kernel, and as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .check import LayerCheck, check_layers, check_outputs, compare, dot_bound
from .epilogue_reference import evaluate64
from .model import Model
from .passes.collect_weights import FusedSite
from .passes.rewrite_weights import KernelCall
from .pipeline import Lowered
from .progress import Progress
from .reference import Capture, Reference, random_inputs
from .runtime import CompiledModule

# Multiply-adds of a float64 reference that one layer may cost; beyond, some of its rows are
# checked.
_MACS = 2_000_000_000


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
    inputs = random_inputs(model)
    with progress.phase("run the dense reference"):
        reference = Reference(model).run(inputs)
    checks: dict[str, LayerCheck] = {}
    rewritten = [fused for fused in sites if fused.site.binding in lowered.calls]
    with progress.phase("check layers", total=len(rewritten)) as phase:
        for number, fused in enumerate(rewritten):
            phase.step(fused.site.name)
            call = lowered.calls[fused.site.binding]
            capture = reference.captures[fused.site.binding]
            checks[fused.site.name] = _check_layer(
                model, fused, call, capture, module.library, number
            )
    check_layers(list(checks.values()))
    outputs = module(*inputs)
    check_outputs(
        [spec.name for spec in model.outputs],
        outputs if isinstance(outputs, list) else [outputs],
        reference.outputs,
        depth=max(1, len(sites)),
        layers=list(checks.values()),
    )
    return checks


def _check_layer(
    model: Model,
    fused: FusedSite,
    call: KernelCall,
    capture: Capture,
    library: Any,
    seed: int,
) -> LayerCheck:
    """Run one kernel as it will be shipped; tensors that the epilogue adds are random here."""
    x, shape = capture.x, capture.y64.shape
    is_matmul = fused.site.workload.op == "matmul"
    if is_matmul:
        x, shape = x.reshape(-1, x.shape[-1]), (capture.y64.size // shape[-1], shape[-1])
    rng = np.random.default_rng(seed)
    tensors = [rng.standard_normal(shape, np.float32) for _ in fused.fused.tensors]
    channels = [model.params[name].reshape(-1) for name in fused.fused.channels]
    got = np.zeros(shape, np.float32)
    _run_kernel(library, call, [x, *call.arrays, *channels, *tensors], got)

    rows = _rows(fused, capture)
    want, magnitude = capture.reference64(rows)
    axis = 1
    picked = slice(None) if rows is None else rows
    terms = capture.terms[..., picked] if is_matmul else capture.terms[picked]
    want, magnitude = (
        (want.reshape(-1, want.shape[-1]), magnitude.reshape(-1, want.shape[-1]))
        if is_matmul
        else (want, magnitude)
    )
    broadcast = (-1,) if is_matmul else (-1, 1, 1)
    value, bound = evaluate64(
        fused.fused.epilogue,
        want,
        dot_bound(magnitude, terms),
        [vector[picked].reshape(broadcast) for vector in channels],
        [tensor[:, picked] for tensor in tensors],
    )
    return compare(fused.site.name, got.take(rows, axis) if rows is not None else got, value, bound)


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
    library: Any, call: KernelCall, arguments: Sequence[np.ndarray], result: np.ndarray
) -> None:
    import tvm

    tensors = [tvm.runtime.tensor(np.ascontiguousarray(argument)) for argument in arguments]
    output = tvm.runtime.tensor(result)
    library.get_function(call.symbol, query_imports=True)(*tensors, output)
    np.copyto(result, output.numpy())
