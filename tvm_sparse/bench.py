"""Time a compiled model against its dense peers, so that the numbers are true.

All systems get the same input in the same fresh process, pinned to as many cores as there are
threads. Each one's output is compared with a reference before it is timed: a wrong output is a
failure and has no time. Then come rounds in which every system is called once, in rotating order;
the figure of a system is its median over the rounds, and a ratio is one of medians of the same run.
Idle thread pools sleep instead of spinning, so that no system slows the next one down.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from .cpu_features import processor_name
from .dtypes import HALF_TYPES, is_float, numpy_dtype
from .errors import InputError, SparseError
from .files import read_onnx, save_onnx, write_text
from .plain_data import build, parse_json
from .progress import SILENT, Progress
from .runtime import aligned_empty

VERSION = 1
OURS = "tvm_sparse"
DEFAULT_PEERS = ("onnxruntime", "openvino", "tvm")

# What may be named in `against` -> the systems that this adds.
PEERS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino f32", "openvino default"),
    "tvm": ("tvm dense",),
    "tvm-stock": ("tvm stock",),
}

# The package that each system needs, and the largest error against the reference that still counts
# as right, relative to the largest output. OpenVINO's default precision is bf16 where there is any;
# for networks in float16 and bfloat16 the larger error counts as right as well.
REQUIRES: Mapping[str, str] = {
    "onnxruntime": "onnxruntime",
    "openvino f32": "openvino",
    "openvino default": "openvino",
}
TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCE = 5e-2
LOW_PRECISION = ("openvino default",)

# The dense peers in float32 that a speed-up is claimed against.
FLOAT32_PEERS = ("onnxruntime", "openvino f32")

MIN_ROUNDS, MAX_ROUNDS = 5, 300
# Long enough for caches to hold what a system itself needs, and for its threads to be awake.
_SHORTEST_SAMPLE = 20e-3

Call = Callable[[], Sequence[np.ndarray]]


@dataclass(frozen=True)
class SystemTime:
    """What one system did with one model.

    Attributes
    ----------
    name : str
        A name of `PEERS`' values, or "tvm_sparse".
    median_ms, low_ms, high_ms : float or None
        Median and quartiles of a call; None when there is no time.
    error : float or None
        Largest difference from the reference, relative to its largest output.
    build_seconds : float or None
        From the file to a callable.
    failure : str
        Why there is no time, in words; empty when there is one.
    """

    name: str
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    error: float | None = None
    build_seconds: float | None = None
    failure: str = ""


@dataclass(frozen=True)
class BenchCase:
    """One model, timed on all systems in one process.

    Attributes
    ----------
    zeros : float or None
        Share of zeros in the weights of Conv, Gemm and MatMul.
    cores : tuple of int
        What the process was pinned to; empty where the system cannot pin.
    reference : str
        What outputs were compared with.
    """

    name: str
    threads: int
    zeros: float | None
    inputs: Mapping[str, tuple[int, ...]]
    cores: tuple[int, ...]
    reference: str
    rounds: int
    systems: tuple[SystemTime, ...]
    notes: tuple[str, ...] = ()

    def system(self, name: str) -> SystemTime | None:
        """Return the system of that name, or None."""
        return next((system for system in self.systems if system.name == name), None)

    def median_ms(self, name: str) -> float | None:
        """Return a system's median in milliseconds, None when it has none."""
        found = self.system(name)
        return found.median_ms if found else None

    @property
    def best_float32_ms(self) -> float | None:
        """The time of the better dense float32 peer."""
        times = [self.median_ms(name) for name in FLOAT32_PEERS]
        return min((t for t in times if t is not None), default=None)

    @property
    def speedup(self) -> float | None:
        """How many times faster than the better dense float32 peer this package is."""
        ours, best = self.median_ms(OURS), self.best_float32_ms
        return best / ours if ours and best else None


@dataclass(frozen=True)
class BenchResult:
    """Times of one or several models on one machine; `str` gives a table.

    Attributes
    ----------
    cpu : str
        The processor's name.
    versions : mapping of str to str
        Of every package that took part.
    date : str
        When, in UTC, as ISO 8601.
    """

    cpu: str
    system: str
    versions: Mapping[str, str]
    date: str
    cases: tuple[BenchCase, ...] = field(default=())

    @property
    def failed(self) -> bool:
        """Whether this package itself has no time on some model."""
        return any(case.median_ms(OURS) is None for case in self.cases)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return everything as JSON; with a path, write it beside its place and rename it there.

        Raises
        ------
        SparseError
            When the file cannot be written.
        """
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    @classmethod
    def from_json(cls, text: str) -> BenchResult:
        """Read what `to_json` wrote.

        Raises
        ------
        SparseError
            When the text is something else.
        """
        try:
            data = parse_json(text)
            if data.pop("version") != VERSION:
                raise SparseError("this benchmark result is of another version")
            return build(cls, data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SparseError(f"this is no benchmark result: {error}") from None

    def table(self) -> str:
        """Return a table for a terminal: milliseconds, and the ratio to the best float32 peer."""
        rows = [_row(case, self._columns) for case in self.cases]
        head = ("model", "zeros", *self._columns, "speed-up")
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if index == 0 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [head, *rows]
        ]
        return "\n".join([*lines, *self._remarks()])

    def markdown(self) -> str:
        """Return the same table for a README."""
        head = ("model", "zeros", *self._columns, "speed-up")
        rows = [head, ("---", *["---:"] * (len(head) - 1))]
        rows += [_row(case, self._columns) for case in self.cases]
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        return "\n\n".join([table, " ".join(self._remarks())])

    def __str__(self) -> str:
        return self.table()

    @property
    def _columns(self) -> tuple[str, ...]:
        order = [OURS, *(name for names in PEERS.values() for name in names)]
        present = {system.name for case in self.cases for system in case.systems}
        return tuple(name for name in order if name in present)

    def _remarks(self) -> list[str]:
        threads = sorted({case.threads for case in self.cases})
        counts = "/".join(map(str, threads)) + (" thread" if threads == [1] else " threads")
        names = ", ".join(f"{name} {version}" for name, version in sorted(self.versions.items()))
        lines = [
            f"Milliseconds a call (median of interleaved rounds), {counts}, {self.cpu}, "
            f"{self.date[:10]}; {names}.",
            "Speed-up: against the better of ONNX Runtime and OpenVINO in float32.",
        ]
        for case in self.cases:
            lines += [
                f"{case.name}: {system.name}: {system.failure}."
                for system in case.systems
                if system.failure
            ]
            lines += [f"{case.name}: {note}." for note in case.notes]
        return lines


def _row(case: BenchCase, columns: Sequence[str]) -> tuple[str, ...]:
    cells = []
    for name in columns:
        system = case.system(name)
        time_ms = system.median_ms if system else None
        cells.append(_milliseconds(time_ms))
    zeros = "-" if case.zeros is None else f"{case.zeros:.0%}"
    ratio = "-" if case.speedup is None else f"{case.speedup:.2f}x"
    return (case.name, zeros, *cells, ratio)


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def bench(
    model: Any,
    against: Sequence[str] = DEFAULT_PEERS,
    threads: int = 1,
    *,
    name: str | None = None,
    target: str = "native",
    plan: str | os.PathLike[str] | None = None,
    records: str | os.PathLike[str] | None = None,
    library: str | os.PathLike[str] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    sparsities: Sequence[float] | None = None,
    skip: Sequence[str] = (),
    repeats: int | None = None,
    seconds: float = 10.0,
    progress: Progress = SILENT,
) -> BenchResult:
    """Time a model on this package and its dense peers.

    Parameters
    ----------
    model : path or onnx.ModelProto
        The peers read ONNX.
    against : sequence of str
        Keys of `PEERS`. A peer that is not installed is said in the result, and is no error.
    threads : int
        Threads, and cores to pin them to.
    name : str, optional
        What the tables call the model.
    target : str
        As for `compile`.
    plan, records : path, optional
        As for `compile`.
    library : path, optional
        An exported library of this model, to be timed instead of compiling it.
    shapes : mapping of str to sequence of int, optional
        Fixes symbolic inputs.
    sparsities : sequence of float, optional
        Time pruned copies (unstructured, layer by layer) instead of the model as it is.
    skip : sequence of str
        Layers that `sparsities` leaves alone.
    repeats : int, optional
        Rounds; by default as many as fit in `seconds`, from 5 to 300.
    seconds : float
        Time to spend on the rounds of one case.

    Returns
    -------
    BenchResult
        With a case for the model, or one for each of `sparsities`.

    Raises
    ------
    SparseError
        When a peer is unknown, the model cannot be read, or the measuring process dies.
    """
    unknown = [peer for peer in against if peer not in PEERS]
    if unknown:
        raise SparseError(f"unknown peer '{unknown[0]}'; there are {', '.join(PEERS)}")
    if threads < 1 or threads > len(_available_cores()):
        raise SparseError(
            f"{threads} threads were asked for; this process may use {len(_available_cores())}"
        )
    if repeats is not None and repeats < 1:
        raise SparseError(f"a benchmark needs one round or more, not {repeats}")
    if library is not None and sparsities:
        raise SparseError("a compiled library has its zeros already; leave the sparsities out")
    options = {
        "against": list(dict.fromkeys(against)),
        "threads": threads,
        "target": target,
        "plan": _absolute(plan),
        "records": _absolute(records),
        "library": _absolute(library),
        "shapes": {key: list(map(int, shape)) for key, shape in (shapes or {}).items()},
        "repeats": repeats,
        "seconds": seconds,
    }
    title = name or _title(model)
    cases = []
    with tempfile.TemporaryDirectory(prefix="tvm-sparse-bench-") as folder:
        for share in sparsities or (None,):
            path = _prepare(model, share, skip, Path(folder))
            job = {**options, "model": str(path), "name": title}
            cases.append(_measure_apart(job, Path(folder), progress))
    return BenchResult(cpu_name(), platform.system(), versions(against), _now(), tuple(cases))


def _absolute(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.path.abspath(path)


def _title(model: Any) -> str:
    if isinstance(model, (str, os.PathLike)):
        return Path(model).stem
    return str(getattr(getattr(model, "graph", None), "name", "") or "model")


def _prepare(model: Any, share: float | None, skip: Sequence[str], folder: Path) -> Path:
    """Return a file for the measuring process: the model as it is, or a pruned copy."""
    from .pruning import prune

    is_path = isinstance(model, (str, os.PathLike))
    if share is None and is_path:
        read_onnx(model)
        return Path(os.path.abspath(model))
    proto = model if share is None else prune(model, "unstructured", share, "layer", skip)
    path = folder / ("model.onnx" if share is None else f"model-{share:g}.onnx")
    save_onnx(proto, path)
    return path


def _measure_apart(job: Mapping[str, Any], folder: Path, progress: Progress) -> BenchCase:
    """Measure in a fresh process: thread pools, pinning and TVM_NUM_THREADS are set for good."""
    job_path, result_path = folder / "job.json", folder / "result.json"
    job_path.write_text(json.dumps({**job, "result": str(result_path)}))
    result_path.unlink(missing_ok=True)
    threads = str(job["threads"])
    environment = {
        **os.environ,
        "TVM_NUM_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
    }
    # Not in the caller's folder: from a checkout, Python would import the half of the package that
    # lies there instead of the installed one.
    command = [sys.executable, "-m", "tvm_sparse.bench", str(job_path)]
    with open(folder / "log.txt", "w+") as log, progress.phase(f"bench {job['name']}") as phase:
        worker = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=folder
        )
        try:
            assert worker.stdout is not None
            for line in worker.stdout:
                if line.startswith("step: "):
                    phase.step(line[6:].strip())
            worker.wait()
        finally:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        log.seek(0)
        said = [line.strip() for line in log if line.strip()]
    if not result_path.exists():
        last = said[-1] if said else "it said nothing"
        code = worker.returncode
        how = f"died by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        raise SparseError(f"the measuring process {how}: {last}")
    data = json.loads(result_path.read_text())
    if "error" in data:
        raise SparseError(data["error"])
    return build(BenchCase, data)


def cpu_name() -> str:
    """Name the processor as the system does, and its kind: clouds sell several under one name."""
    from .targets import resolve_target

    return f"{processor_name()} ({resolve_target('native').attrs['mcpu']})"


def versions(against: Sequence[str]) -> dict[str, str]:
    """Return the version of every installed package that takes part."""
    packages = ["tvm-sparse", "apache-tvm"]
    packages += [REQUIRES[s] for peer in against for s in PEERS.get(peer, ()) if s in REQUIRES]
    found = {}
    for package in dict.fromkeys(packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# ---------------------------------------------------------------------------------------------
# Pinning and timing
# ---------------------------------------------------------------------------------------------


def _available_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _one_per_physical_core(cores: Sequence[int]) -> list[int]:
    """Order cores so that hardware threads of a core already named come last."""
    first: list[int] = []
    later: list[int] = []
    seen: set[str] = set()
    for core in cores:
        path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        try:
            siblings = path.read_text().strip()
        except OSError:
            siblings = str(core)
        (later if siblings in seen else first).append(core)
        seen.add(siblings)
    return first + later


@contextmanager
def pinned(threads: int) -> Iterator[tuple[int, ...]]:
    """Pin this process to `threads` cores, each a physical one as far as they go; then undo it.

    Yields
    ------
    tuple of int
        The cores; empty on a system that cannot pin.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield ()
        return
    before = os.sched_getaffinity(0)
    chosen = tuple(_one_per_physical_core(sorted(before))[:threads])
    os.sched_setaffinity(0, chosen)
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, before)


def interleave(
    systems: Mapping[str, Callable[[], Any]],
    *,
    repeats: int | None = None,
    seconds: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time systems in turn: after warming up, every round calls each one once.

    A system whose call takes less than 20 milliseconds is called several times in a row, and its
    sample is the mean of those: after the others, caches hold what they used, and threads
    sleep. The order rotates by one from round to round.

    Parameters
    ----------
    systems : mapping of str to callable
        What to time.
    repeats : int, optional
        Rounds; by default as many as fit in `seconds`, from 5 to 300.

    Returns
    -------
    dict of str to list of float
        Seconds a call, one for each round.
    """
    names = list(systems)
    inner = {}
    for name in names:
        systems[name]()
        single = _sample(systems[name], 1, clock)
        # A second look: the first timed call may still pay for something.
        single = min(single, _sample(systems[name], 1, clock))
        inner[name] = max(1, math.ceil(_SHORTEST_SAMPLE / max(single, 1e-7)))
    # A round whose order and batching are those of the real ones warms caches and gives its length.
    length = sum(_sample(systems[name], inner[name], clock) * inner[name] for name in names)
    rounds = repeats or min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / max(length, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            shift = turn % len(names) if names else 0
            for name in names[shift:] + names[:shift]:
                times[name].append(_sample(systems[name], inner[name], clock))
    finally:
        if collecting:
            gc.enable()
    return times


def _sample(call: Callable[[], Any], inner: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(inner):
        call()
    return (clock() - start) / inner


def relative_error(outputs: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """Return the largest difference, relative to the largest wanted value of the same output.

    It is NaN where shapes or non-finite values differ.
    """
    if len(outputs) != len(wanted):
        return math.nan
    worst = 0.0
    for got, want in zip(outputs, wanted, strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        if got.shape != want.shape:
            return math.nan
        finite = np.isfinite(want)
        if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
            return math.nan
        scale = np.abs(want[finite]).max(initial=0.0) or 1.0
        worst = max(worst, float(np.abs(got[finite] - want[finite]).max(initial=0.0) / scale))
        if not np.isfinite(got[finite]).all():
            return math.nan
    return worst


# ---------------------------------------------------------------------------------------------
# The measuring process
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    model: str
    name: str
    against: list[str]
    threads: int
    target: str
    plan: str | None
    records: str | None
    library: str | None
    shapes: dict[str, list[int]]
    repeats: int | None
    seconds: float
    result: str

    def systems(self) -> list[str]:
        return [OURS, *(system for peer in self.against for system in PEERS[peer])]


@dataclass(frozen=True)
class _Feed:
    """The model's inputs by name, in order, with the arrays that every system gets."""

    arrays: Mapping[str, np.ndarray]


def _random_feed(job: _Job) -> _Feed:
    graph = read_onnx(job.model).graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    names = [value.name for value in inputs]
    for name in job.shapes:
        if name not in names:
            raise InputError(f"the model has no input '{name}'; its inputs are {', '.join(names)}")
    rng = np.random.default_rng(0)
    return _Feed({value.name: _random_array(value, job.shapes, rng) for value in inputs})


def _random_array(
    value: Any, shapes: Mapping[str, Sequence[int]], rng: np.random.Generator
) -> np.ndarray:
    import onnx

    kind = value.type.tensor_type
    declared = [
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
        for dim in kind.shape.dim
    ]
    shape = shapes.get(value.name, declared)
    free = [size for size in shape if isinstance(size, str)]
    if free:
        raise InputError(
            f"input '{value.name}' has the symbolic dimension '{free[0]}'; "
            f"give its shape: --shape {value.name}={','.join(map(str, shape))} with numbers"
        )
    fits = len(shape) == len(declared) and all(
        isinstance(want, str) or want == got for want, got in zip(declared, shape, strict=True)
    )
    if not fits:
        raise InputError(f"input '{value.name}' is {declared}, and the shape given is {shape}")
    sizes = [int(size) for size in shape]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    # Aligned, as a careful caller's arrays are: what every system can take as it lies.
    array = aligned_empty(tuple(sizes), dtype)
    if is_float(dtype):
        array[...] = rng.standard_normal(sizes)
    else:
        array[...] = rng.integers(0, 2, sizes)
    return array


def _build_onnxruntime(job: _Job, feed: _Feed) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(job.model, options, providers=["CPUExecutionProvider"])
    arrays = dict(feed.arrays)
    return lambda: session.run(None, arrays)


def _build_openvino(job: _Job, feed: _Feed, precision: str | None) -> Call:
    import openvino

    core = openvino.Core()
    model = core.read_model(job.model)
    model.reshape({name: list(array.shape) for name, array in feed.arrays.items()})
    options: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": job.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # The process is pinned already; OpenVINO's own pinning would move it.
        "ENABLE_CPU_PINNING": False,
    }
    if precision:
        options["INFERENCE_PRECISION_HINT"] = precision
    compiled = core.compile_model(model, "CPU", options)
    request = compiled.create_infer_request()
    arrays = dict(feed.arrays)
    # OpenVINO hands bfloat16 out as float16 with the wrong meaning.
    ports = [(port, port.element_type == openvino.Type.bf16) for port in compiled.outputs]

    def call() -> list[np.ndarray]:
        results = request.infer(arrays, share_inputs=True)
        return [
            results[port].view(numpy_dtype("bfloat16")) if is_bfloat16 else results[port]
            for port, is_bfloat16 in ports
        ]

    return call


def _build_ours(job: _Job, feed: _Feed, *, dense: bool) -> Call:
    import tvm_sparse as ts

    shapes = {name: array.shape for name, array in feed.arrays.items()} if job.shapes else None
    if job.library and not dense:
        from .deploy import load_module

        module = load_module(job.library, threads=job.threads)
    else:
        model = ts.load(job.model, shapes=shapes)
        plan: ts.Plan | None
        if dense:
            plan = ts.plan(model, target=job.target, threads=job.threads, forbid=["*"])
        else:
            plan = ts.Plan.from_json(Path(job.plan)) if job.plan else None
        records = None if dense else job.records
        # The output is compared below, with an outsider's.
        module = ts.compile(
            model, target=job.target, plan=plan, records=records, check=False, threads=job.threads
        )
    arrays = [feed.arrays[spec.name] for spec in module.inputs]

    def call() -> list[np.ndarray]:
        outputs = module(*arrays)
        return outputs if isinstance(outputs, list) else [outputs]

    return call


def _build_tvm_stock(job: _Job, feed: _Feed) -> Call:
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    from .targets import resolve_target

    target = resolve_target(job.target)
    shapes = {name: list(array.shape) for name, array in feed.arrays.items()}
    module = from_onnx(read_onnx(job.model), shape_dict=shapes)
    pipeline = relax.get_default_pipeline(target)
    machine = relax.VirtualMachine(tvm.compile(module, target, relax_pipeline=pipeline), tvm.cpu())
    arrays = [tvm.runtime.tensor(array) for array in feed.arrays.values()]

    def call() -> list[np.ndarray]:
        result = machine["main"](*arrays)
        single = hasattr(result, "numpy")
        return [tensor.numpy() for tensor in ([result] if single else result)]

    return call


BUILDERS: Mapping[str, Callable[[_Job, _Feed], Call]] = {
    OURS: lambda job, feed: _build_ours(job, feed, dense=False),
    "onnxruntime": _build_onnxruntime,
    "openvino f32": lambda job, feed: _build_openvino(job, feed, "f32"),
    "openvino default": lambda job, feed: _build_openvino(job, feed, None),
    "tvm dense": lambda job, feed: _build_ours(job, feed, dense=True),
    "tvm stock": _build_tvm_stock,
}


def _reference(job: _Job, feed: _Feed) -> tuple[str, list[np.ndarray]]:
    # ONNX Runtime lacks most operators in bfloat16 on a processor.
    if importlib.util.find_spec("onnxruntime") and "bfloat16" not in _types(feed.arrays.values()):
        return "onnxruntime", [np.array(y) for y in _build_onnxruntime(job, feed)()]
    from .frontends.loading import load
    from .reference import Reference

    shapes = {name: array.shape for name, array in feed.arrays.items()} if job.shapes else None
    model = load(job.model, shapes=shapes)
    outputs = Reference(model).run([feed.arrays[spec.name] for spec in model.inputs]).outputs
    return "NumPy", [np.array(y) for y in outputs]


def _types(arrays: Iterable[np.ndarray]) -> set[str]:
    return {str(array.dtype) for array in arrays}


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if isinstance(error, SparseError) else f"{type(error).__name__}: {lines[-1]}"
    return text.strip().rstrip(".")


def _zeros(path: str) -> float | None:
    from .pruning import prune_with_report

    try:
        return prune_with_report(path, "unstructured", 0.0).sparsity
    except SparseError:
        return None


def _measure(job: _Job, say: Callable[[str], None]) -> BenchCase:
    """Build, compare and time every system of a job in this process."""
    feed = _random_feed(job)
    with pinned(job.threads) as cores:
        say("reference")
        reference, wanted = _reference(job, feed)
        results: dict[str, SystemTime] = {}
        calls: dict[str, Call] = {}
        for system in job.systems():
            say(f"build {system}")
            results[system], call = _try_system(system, job, feed, wanted)
            if call is not None:
                calls[system] = call
        say("time")
        times = interleave(calls, repeats=job.repeats, seconds=job.seconds)
    for system, samples in times.items():
        low, median, high = np.percentile(np.array(samples) * 1e3, [25, 50, 75]).tolist()
        old = results[system]
        results[system] = SystemTime(
            system, median, low, high, error=old.error, build_seconds=old.build_seconds
        )
    return BenchCase(
        name=job.name,
        threads=job.threads,
        zeros=_zeros(job.model),
        inputs={name: array.shape for name, array in feed.arrays.items()},
        cores=cores,
        reference=reference,
        rounds=len(next(iter(times.values()), [])),
        systems=tuple(results.values()),
        notes=() if cores else ("the process could not be pinned to cores",),
    )


def _try_system(
    system: str, job: _Job, feed: _Feed, wanted: Sequence[np.ndarray]
) -> tuple[SystemTime, Call | None]:
    package = REQUIRES.get(system)
    if package and not importlib.util.find_spec(package):
        return SystemTime(system, failure=f"{package} is not installed"), None
    start = time.perf_counter()
    try:
        call = BUILDERS[system](job, feed)
        built = time.perf_counter() - start
        error = relative_error([np.array(y) for y in call()], wanted)
    except Exception as reason:
        return SystemTime(system, failure=_one_line(reason)), None
    is_low = system in LOW_PRECISION or bool(_types(wanted) & HALF_TYPES)
    limit = LOW_PRECISION_TOLERANCE if is_low else TOLERANCE
    if not error <= limit:
        failure = f"its output is wrong (error {error:.2g} of the largest value, {limit:g} allowed)"
        known = None if math.isnan(error) else error
        return SystemTime(system, error=known, build_seconds=built, failure=failure), None
    return SystemTime(system, error=error, build_seconds=built), call


def _worker(job_path: str) -> int:
    job = _Job(**json.loads(Path(job_path).read_text()))

    def say(text: str) -> None:
        print(f"step: {text}", flush=True)

    try:
        data: dict[str, Any] = asdict(_measure(job, say))
    except SparseError as error:
        data = {"error": str(error)}
    Path(job.result).write_text(json.dumps(data))
    return 0


if __name__ == "__main__":
    sys.exit(_worker(sys.argv[1]))
