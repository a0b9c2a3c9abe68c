"""``tvm-sparse demo``: the main job on a pruned model made here, from file to timed library."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .bench import BenchResult
from .errors import SparseError
from .progress import Progress

if TYPE_CHECKING:
    import onnx

SPARSITY = 0.9


def _encoder() -> tuple[onnx.ModelProto, list[str]]:
    from .zoo import bert_encoder

    return bert_encoder(layers=4, hidden=512, heads=8, ffn=2048), []


def _mobilenet() -> tuple[onnx.ModelProto, list[str]]:
    from .zoo import mobilenet_v1

    # Hardly anything can be cut from these without harm, so nobody prunes them.
    return mobilenet_v1(), ["stem", "*/depthwise"]


# Name -> what it is, and how to build it together with the layers that pruning leaves alone.
MODELS: Mapping[str, tuple[str, Callable[[], tuple[Any, list[str]]]]] = {
    "encoder": ("a BERT encoder (4 layers, hidden 512, 128 tokens)", _encoder),
    "mobilenet": ("MobileNetV1 (224 x 224)", _mobilenet),
}


def demo(
    folder: str | os.PathLike[str] | None = None, threads: int = 1, model: str = "encoder"
) -> BenchResult:
    """Prune, inspect, compile, check, export, load, run and time a model; print each step.

    Parameters
    ----------
    folder : path, optional
        Where the pruned model and the library are kept; by default they are deleted.
    threads : int
        To compile for, and to measure on.
    model : str
        A key of `MODELS`.

    Raises
    ------
    SparseError
        When a step fails, or the library disagrees with the dense model.
    """
    if model not in MODELS:
        raise SparseError(f"no demo model '{model}'; there are {', '.join(MODELS)}")
    if folder is not None:
        os.makedirs(folder, exist_ok=True)
        return _steps(Path(folder), threads, model)
    with tempfile.TemporaryDirectory(prefix="tvm-sparse-demo-") as temporary:
        return _steps(Path(temporary), threads, model)


@contextmanager
def _step(title: str) -> Iterator[list[str]]:
    """Print a step when it is done: its title, its time, and the lines that it appended."""
    started = time.perf_counter()
    lines: list[str] = []
    yield lines
    print(f"* {title} ({time.perf_counter() - started:.1f} s)", flush=True)
    for line in lines:
        print(f"    {line}", flush=True)


def _steps(folder: Path, threads: int, name: str) -> BenchResult:
    import tvm_sparse as ts

    what, build = MODELS[name]
    source, library = folder / f"{name}.onnx", folder / f"{name}.so"
    with _step(f"build {what}, and prune it to {SPARSITY:.0%} zeros") as say:
        say.append(_prune(build, source))
    with _step("load it, and look at its weights"):
        loaded = ts.load(source)
        found = ts.inspect(loaded).summary()
    print(f"    {found['layers']} layers with weights, {1 - found['density']:.1%} zeros")
    with _step("compile it, and compare every layer and the whole with the dense model") as say:
        module = ts.compile(loaded, threads=threads, progress=Progress())
        say.extend(_what_became(module.report))
    with _step("export it as one shared library") as say:
        module.export(library)
        packed, dense = library.stat().st_size, loaded.weight_bytes
        say.append(f"{packed / 2**20:.1f} MiB; the dense weights alone are {dense / 2**20:.1f} MiB")
    with _step("load the library again, and run it") as say:
        say.append(_run(library, module, threads))
    result = _time(source, library, threads, what)
    print(f"\n{result}")
    if result.failed:
        raise SparseError("the demo's own library could not be timed; the table says why")
    print(f"\n{_closing(result, found)}")
    return result


def _prune(build: Callable[[], tuple[Any, list[str]]], path: Path) -> str:
    from .files import save_onnx
    from .pruning import prune_with_report

    proto, skip = build()
    pruning = prune_with_report(proto, "unstructured", SPARSITY, "layer", skip)
    save_onnx(pruning.model, path)
    left = f"; {len(pruning.kept)} left alone" if pruning.kept else ""
    return f"{len(pruning.layers)} layers pruned{left}; {path.name}"


def _what_became(report: Any) -> list[str]:
    counts = report.summary()
    lines = [
        f"{counts.get('sparse', 0)} layers got sparse kernels, {counts.get('dense', 0)} stay dense"
    ]
    reasons: dict[str, int] = {}
    for layer in report.layers:
        if not layer.is_sparse and layer.reason:
            reasons[layer.reason] = reasons.get(layer.reason, 0) + 1
    return lines + [f"dense ({count}x): {reason}" for reason, count in reasons.items()]


def _run(library: Path, compiled: Any, threads: int) -> str:
    from .deploy import load_module

    module = load_module(library, threads=threads)
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal([int(size) for size in spec.shape]).astype(spec.dtype)
        for spec in module.inputs
    ]
    if not np.array_equal(module(*arrays), compiled(*arrays)):
        raise SparseError("the loaded library gives another answer than the module it came from")
    return "the same answer, bit for bit"


def _time(source: Path, library: Path, threads: int, what: str) -> BenchResult:
    from .bench import bench

    with _step("time it against its dense peers, in a process of its own"):
        return bench(
            source,
            ("onnxruntime", "openvino", "tvm"),
            threads,
            name=what.split(" (")[0].removeprefix("a "),
            library=library,
            seconds=5.0,
            progress=Progress(),
        )


def _closing(result: BenchResult, found: Mapping[str, Any]) -> str:
    case = result.cases[0]
    ours, dense = case.median_ms("tvm_sparse"), case.median_ms("tvm dense")
    parts = []
    if ours and dense:
        parts.append(f"{dense / ours:.1f} times as fast as compiled densely")
    if case.speedup:
        parts.append(f"{case.speedup:.1f} times as fast as the better dense float32 peer")
    zeros = 1 - found["density"]
    return f"With {zeros:.0%} zeros the model is {' and '.join(parts) or 'compiled and checked'}."
