"""A compiled model that runs: arrays in, arrays out, on TVM's runtime alone."""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .cpu_features import available_cores
from .device import CPU, device_kind, machine_devices, moved
from .dtypes import numpy_dtype
from .errors import InputError, LibraryError, TargetError
from .instances import InstancePool
from .manifest import Manifest
from .memory_pool import bound_memory
from .model import TensorSpec
from .thread_pool import Team, use_one_thread

if TYPE_CHECKING:
    from .report import Report

ALIGNMENT = 64

# What is there of them is loaded, in this order. The extra ones sort and draw random numbers.
RUNTIME_LIBRARIES = (
    "libtvm_runtime.so",
    "libtvm_runtime_extra.so",
    "libtvm_runtime.dylib",
    "libtvm_runtime_extra.dylib",
    "tvm_runtime.dll",
    "tvm_runtime_extra.dll",
)


@dataclass(frozen=True)
class KernelTime:
    """What one kernel took in one run: the median over the repeats.

    Attributes
    ----------
    symbol : str
        The kernel's name in the library.
    calls : int
        Calls in one run.
    microseconds : float
        All calls of one run together. Each call carries about a microsecond of measuring.
    layers : tuple of str
        The user's layers that it computes; empty for glue.
    """

    symbol: str
    calls: int
    microseconds: float
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Profile:
    """Measured times of one model on one input.

    Attributes
    ----------
    kernels : tuple of KernelTime
        The slowest first.
    layers : mapping of str to float
        Microseconds by the user's layer name, for the layers that have kernels of their own.
    total_microseconds : float
        Median of whole runs without the instrument.
    report : Report
        The module's report with the measured times filled in.
    """

    kernels: tuple[KernelTime, ...]
    layers: Mapping[str, float]
    total_microseconds: float
    report: Report | None = None

    def __str__(self) -> str:
        rows = [f"{'microseconds':>12}  {'calls':>5}  kernel"]
        for row in self.kernels:
            label = f"{row.symbol} ({', '.join(row.layers)})" if row.layers else row.symbol
            rows.append(f"{row.microseconds:12.1f}  {row.calls:5d}  {label}")
        rows.append(f"{self.total_microseconds:12.1f}         whole run, not instrumented")
        return "\n".join(rows)


class Runner:
    """A model that runs: arrays in, arrays out.

    Calls from several Python threads are safe and run at the same time, each on an instance of its
    own, up to `instances` of them; further calls wait for one. An instance is a virtual machine of
    TVM and, with two threads or more, the threads that it runs on. All share the weights. A call
    has the result that it has alone, bit for bit. A process may fork: that waits for calls that
    run, and the child goes on with the same module.

    Parameters
    ----------
    library : tvm_ffi.Module
        What holds `vm_load_executable`: a runnable module of TVM or a loaded library. TVM's runtime
        is loaded.
    manifest : Manifest
        The names, types and shapes to check calls against.
    threads : int, optional
        Threads to run on; by default TVM_NUM_THREADS, then what the module was compiled for.
    refusal : str, optional
        Why this machine cannot run the module; `library` is not used.
    cpus : sequence of int, optional
        The cores to run on, by the system's numbers. By default the system chooses among those
        of the calling thread.
    instances : int, optional
        Calls that run at the same time; by default as many as have threads of their own on the
        cores, and one on a GPU.
    making : callable, optional
        What surrounds the making of each virtual machine.

    Raises
    ------
    InputError
        When `threads` or `instances` is less than one, or the process may not use a core of `cpus`.
    """

    def __init__(
        self,
        library: Any,
        manifest: Manifest,
        threads: int | None = None,
        refusal: str | None = None,
        *,
        cpus: Sequence[int] | None = None,
        instances: int | None = None,
        making: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"a module runs on one thread or more, not on {threads}")
        if instances is not None and instances < 1:
            raise InputError(f"a module has one instance or more, not {instances}")
        self.manifest = manifest
        self.threads = threads or int(os.environ.get("TVM_NUM_THREADS") or 0) or manifest.threads
        self.cpus = None if cpus is None else _usable(cpus)
        self.library, self._refusal = library, refusal
        self._device = device_kind(manifest.target)
        if refusal is None:
            self._machines = InstancePool(
                lambda: self._make_machine(making), instances or self._usual_instances()
            )

    def _usual_instances(self) -> int:
        if self._device != CPU:
            return 1
        cores = len(available_cores() if self.cpus is None else self.cpus)
        return max(1, cores // self.threads)

    def _make_machine(self, making: Callable[[], AbstractContextManager[None]]) -> _Machine:
        with making():
            return _Machine(self.library, self._device, len(self.manifest.inputs))

    @property
    def instances(self) -> int:
        """How many calls run at the same time; 0 where none can."""
        return 0 if self._refusal is not None else self._machines.limit

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs in calling order."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs in the order in which a call returns them."""
        return self.manifest.outputs

    def __call__(self, *arrays: Any) -> Any:
        """Run the model on positional inputs.

        Parameters
        ----------
        *arrays : numpy.ndarray or any CPU tensor with DLPack
            One for each of `inputs`, of its dtype and shape. Data that is not contiguous and
            64-byte aligned is copied first.

        Returns
        -------
        numpy.ndarray or list of numpy.ndarray
            The output, or the list of outputs when there are several. The caller owns them.

        Raises
        ------
        InputError
            When the number, dtype or shape of the inputs does not fit.
        TargetError
            When this machine lacks instructions that the module was compiled for.
        """
        if len(arrays) != len(self.inputs):
            names = ", ".join(spec.name for spec in self.inputs)
            raise InputError(
                f"the model takes {_count(len(self.inputs), 'input')} ({names}), "
                f"and the call gives {len(arrays)}"
            )
        outputs = self._run(arrays)
        return outputs[0] if len(outputs) == 1 else outputs

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run the model on inputs by name.

        Parameters
        ----------
        inputs : mapping of str to array
            One array for each of `inputs`; see `__call__`.

        Returns
        -------
        dict of str to numpy.ndarray
            By output name. The caller owns them.

        Raises
        ------
        InputError
            When a name is missing or unknown, or a dtype or shape does not fit.
        """
        outputs = self._run(self._by_name(inputs))
        return {spec.name: value for spec, value in zip(self.outputs, outputs, strict=True)}

    def __repr__(self) -> str:
        inputs = ", ".join(describe(spec) for spec in self.inputs)
        outputs = ", ".join(describe(spec) for spec in self.outputs)
        name = type(self).__name__
        return f"{name}({inputs} -> {outputs}; {_count(self.threads, 'thread')})"

    def _by_name(self, inputs: Mapping[str, Any]) -> list[Any]:
        wanted = [spec.name for spec in self.inputs]
        unknown = [str(name) for name in inputs if name not in wanted]
        missing = [name for name in wanted if name not in inputs]
        if unknown or missing:
            parts = [f"does not know {_quoted(unknown)}"] if unknown else []
            parts += [f"misses {_quoted(missing)}"] if missing else []
            raise InputError(f"the model {' and '.join(parts)}; its inputs are {_quoted(wanted)}")
        return [inputs[name] for name in wanted]

    def _run(self, values: Sequence[Any], instrument: Any = None) -> list[np.ndarray]:
        if self._refusal is not None:
            raise TargetError(self._refusal)
        arrays = [
            _as_array(spec.name, value) for spec, value in zip(self.inputs, values, strict=True)
        ]
        bound_memory(tuple(check_inputs(self.inputs, arrays).values()))
        with self._machines.lent() as machine:
            work = partial(self._outputs, machine, arrays, instrument)
            return machine.on_threads(self.threads, self.cpus, work)

    def _outputs(
        self, machine: _Machine, arrays: Sequence[np.ndarray], instrument: Any
    ) -> list[np.ndarray]:
        try:
            result = machine.call(arrays, instrument)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"the model failed on these inputs: {_first_line(error)}") from error
        tensors = [moved(tensor, CPU) for tensor in _flatten(result)]
        fresh = self.manifest.fresh_outputs
        if len(fresh) != len(tensors):
            fresh = (False,) * len(tensors)
        # Copied while the machine is ours: an output may be an input's buffer or a constant.
        return [_hand_out(tensor, own) for tensor, own in zip(tensors, fresh, strict=True)]


class _Machine:
    """One virtual machine and the threads that it runs on, for one call at a time."""

    def __init__(self, library: Any, device: int, inputs: int) -> None:
        self._team: Team | None = None
        self._machine = library["vm_load_executable"]()
        self._machine["vm_initialization"](*machine_devices(device))
        self._main = self._machine["main"]
        self._staging = [_Staging() for _ in range(inputs)]
        self._device = device

    def on_threads(
        self, threads: int, cores: Sequence[int] | None, work: Callable[[], list[np.ndarray]]
    ) -> list[np.ndarray]:
        """Do something on a number of threads."""
        if threads == 1 and cores is None:
            use_one_thread()
            return work()
        team = self._team
        # Another process's is that of the parent that forked this one.
        if team is None or (team.threads, team.process) != (threads, os.getpid()):
            team = self._team = Team(threads, cores)
        return team.run(work)

    def call(self, arrays: Sequence[np.ndarray], instrument: Any) -> Any:
        """Run on arrays that were checked; the instrument hears of every kernel."""
        operands = [
            moved(stage.tensor(array), self._device)
            for stage, array in zip(self._staging, arrays, strict=True)
        ]
        if instrument is None:
            return self._main(*operands)
        self._machine["set_instrument"](instrument)
        try:
            return self._main(*operands)
        finally:
            self._machine["set_instrument"](None)


class CompiledModule(Runner):
    """A compiled model with its manifest; made by `compile` and by `load_module`.

    `Runner` says what calls from several threads do.

    Parameters
    ----------
    library, manifest, threads, refusal, cpus, instances, making
        As for `Runner`; a module with a refusal can still be exported.
    exporter : callable, optional
        Writes this module to a path; what `export` calls.
    cuda_source : str, optional
        The source of a GPU's kernels, for those who want to read it; loaded libraries have none.
    """

    def __init__(
        self,
        library: Any,
        manifest: Manifest,
        threads: int | None = None,
        exporter: Callable[[Path], None] | None = None,
        refusal: str | None = None,
        cuda_source: str | None = None,
        *,
        cpus: Sequence[int] | None = None,
        instances: int | None = None,
        making: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if refusal is None:
            load_runtime()
        super().__init__(
            library, manifest, threads, refusal, cpus=cpus, instances=instances, making=making
        )
        self._exporter, self.cuda_source = exporter, cuda_source

    def described_by(
        self, manifest: Manifest, exporter: Callable[[Path], None] | None
    ) -> CompiledModule:
        """Return the same running module under another manifest; the two share their instances."""
        module = copy.copy(self)
        module.manifest, module._exporter = manifest, exporter
        return module

    @property
    def refusal(self) -> str | None:
        """Why this machine cannot run the module; None when it can."""
        return self._refusal

    @property
    def report(self) -> Report:
        """What became of every layer, as it was when the model was compiled.

        Raises
        ------
        LibraryError
            When the library was exported without a report.
        """
        if not self.manifest.report:
            raise LibraryError("this library was exported without a report")
        from .report import Report

        return Report.from_json(json.dumps(self.manifest.report))

    def profile(self, *arrays: Any, repeats: int = 10) -> Profile:
        """Measure every kernel on one input.

        Parameters
        ----------
        *arrays : array
            As for a call; or one mapping by name, as for `run`.
        repeats : int
            Instrumented runs; each number is the median over them. One run before them warms up.

        Returns
        -------
        Profile
            The kernels, the slowest first, and the report with measured times.
        """
        if repeats < 1:
            raise InputError(f"a profile needs one repeat or more, not {repeats}")
        if len(arrays) == 1 and isinstance(arrays[0], Mapping):
            arrays = tuple(self._by_name(arrays[0]))
        self(*arrays)
        totals = []
        for _ in range(repeats):
            start = time.perf_counter()
            self(*arrays)
            totals.append(time.perf_counter() - start)
        runs = [self._instrumented(arrays) for _ in range(repeats)]
        return _summarise(runs, totals, self.manifest)

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write the module as one shared library that `load_module` reads.

        The file appears whole or not at all: it is written beside its place and renamed.

        Raises
        ------
        LibraryError
            When the file cannot be written.
        """
        if self._exporter is None:
            raise LibraryError(
                "this module was not made by compile or load_module and cannot be exported"
            )
        self._exporter(Path(path))

    def _instrumented(self, arrays: Sequence[Any]) -> list[tuple[str, float]]:
        calls: list[tuple[str, float]] = []
        starts: list[float] = []

        def instrument(_func: Any, symbol: str, before: bool, *_: Any) -> None:
            now = time.perf_counter()
            if before:
                starts.append(time.perf_counter())
            else:
                calls.append((str(symbol), now - starts.pop()))

        self._run(arrays, instrument)
        return calls


class _Staging:
    """One input's aligned buffer, kept between calls so that its pages stay mapped."""

    def __init__(self) -> None:
        self._buffer: np.ndarray | None = None

    def tensor(self, array: np.ndarray) -> Any:
        import tvm_ffi

        if not array.size:
            # NumPy gives it strides that kernels refuse; nothing is read of the byte that it gets.
            byte = tvm_ffi.from_dlpack(aligned_empty((1,), np.uint8))
            return _seen_as(byte, array.shape, array.dtype.name)
        flags = array.flags
        # A read-only array is copied because DLPack cannot say "read-only" before NumPy 2.1.
        if not (flags.c_contiguous and flags.writeable and array.dtype.isnative):
            array = self._copy(array)
        elif array.ctypes.data % ALIGNMENT:
            array = self._copy(array)
        return tensor_of(array)

    def _copy(self, array: np.ndarray) -> np.ndarray:
        dtype = array.dtype.newbyteorder("=")
        buffer = self._buffer
        if buffer is None or buffer.shape != array.shape or buffer.dtype != dtype:
            buffer = self._buffer = aligned_empty(array.shape, dtype)
        np.copyto(buffer, array)
        return buffer


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Allocate an uninitialised C-contiguous array whose data starts on a 64-byte boundary."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def tensor_of(array: np.ndarray) -> Any:
    """See a writable, contiguous array as a tensor, without a copy."""
    import tvm_ffi

    if array.dtype.name == _BFLOAT16:
        return _seen_as(tvm_ffi.from_dlpack(array.view(np.uint16)), array.shape, _BFLOAT16)
    return tvm_ffi.from_dlpack(array)


def array_of(tensor: Any) -> np.ndarray:
    """See a tensor of the processor as an array, without a copy."""
    if str(tensor.dtype) == _BFLOAT16:
        bits = np.from_dlpack(_seen_as(tensor, tuple(tensor.shape), "uint16"))
        return bits.view(numpy_dtype(_BFLOAT16))
    return np.from_dlpack(tensor)


def check_inputs(specs: Sequence[TensorSpec], arrays: Sequence[np.ndarray]) -> dict[str, int]:
    """Hold arrays against what a model wants; return the values of the symbolic dimensions.

    Raises
    ------
    InputError
        When a dtype, rank or shape does not fit, or when two inputs disagree on a symbolic
        dimension.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for spec, array in zip(specs, arrays, strict=True):
        _check_dtype(spec, array)
        if array.ndim != len(spec.shape):
            raise InputError(
                f"input '{spec.name}' has {_count(array.ndim, 'dimension')}, {array.shape}; "
                f"the model wants {_shape(spec)}"
            )
        for want, got in zip(spec.shape, array.shape, strict=True):
            _check_dimension(spec, array, want, got, sizes)
    return {name: size for name, (size, _) in sizes.items()}


def _check_dtype(spec: TensorSpec, array: np.ndarray) -> None:
    got = str(array.dtype.newbyteorder("="))
    if got != spec.dtype:
        wanted = "ml_dtypes.bfloat16" if spec.dtype == _BFLOAT16 else f"'{spec.dtype}'"
        raise InputError(
            f"input '{spec.name}' is {got}, and the model wants {spec.dtype}: "
            f"convert it with .astype({wanted})"
        )


def _check_dimension(
    spec: TensorSpec,
    array: np.ndarray,
    want: int | str,
    got: int,
    sizes: dict[str, tuple[int, str]],
) -> None:
    if isinstance(want, int):
        if want != got:
            raise InputError(
                f"input '{spec.name}' has shape {array.shape}, and the model wants {_shape(spec)}"
            )
        return
    size, first = sizes.setdefault(want, (got, spec.name))
    if size != got:
        raise InputError(
            f"input '{spec.name}' has shape {array.shape}, and the model wants {_shape(spec)}: "
            f"'{want}' is {size} in input '{first}' and {got} here"
        )


def describe(spec: TensorSpec) -> str:
    """Write a tensor as ``name: float32 (batch, 128)``."""
    return f"{spec.name}: {spec.dtype} {_shape(spec)}"


def load_runtime() -> None:
    """Load TVM's runtime library, unless it is there already; never imports the `tvm` package.

    Raises
    ------
    LibraryError
        When TVM is not installed, or its runtime cannot be loaded.
    """
    if not _has_runtime():
        load_runtime_from(find_runtime_folder())


def load_runtime_from(folder: Path) -> None:
    """Load TVM's runtime libraries of a folder, unless there is a runtime already.

    Raises
    ------
    LibraryError
        When one is missing or cannot be loaded.
    """
    if _has_runtime():
        return
    names = [name for name in RUNTIME_LIBRARIES if (folder / name).is_file()]
    if not names:
        raise LibraryError(f"TVM's runtime library is not in '{folder}'")
    try:
        for name in names:
            # Global, because a library's code looks its helpers up among the process's symbols.
            ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise LibraryError(f"TVM's runtime cannot be loaded: {error}") from None


def _has_runtime() -> bool:
    import tvm_ffi

    return tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True) is not None


def find_runtime_folder() -> Path:
    """Find the folder that TVM's runtime libraries are in.

    Raises
    ------
    LibraryError
        When TVM is not installed.
    """
    folders = [Path(os.environ["TVM_LIBRARY_PATH"])] if os.environ.get("TVM_LIBRARY_PATH") else []
    spec = importlib.util.find_spec("tvm")
    for location in (spec.submodule_search_locations or []) if spec else []:
        folders.append(Path(location) / "lib")
    for folder in folders:
        if any((folder / name).is_file() for name in RUNTIME_LIBRARIES):
            return folder
    raise LibraryError(
        "TVM's runtime library was not found; install it with: pip install apache-tvm"
    )


def _as_array(name: str, value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, np.generic):
        return np.asarray(value)
    if not hasattr(value, "__dlpack__"):
        kind = type(value).__name__
        raise InputError(
            f"input '{name}' is of type {kind}; give a NumPy array or a tensor with DLPack"
        )
    device = getattr(value, "__dlpack_device__", lambda: (CPU, 0))()
    if int(device[0]) != CPU:
        raise InputError(f"input '{name}' lies on another device; copy it to the CPU first")
    try:
        return _through_dlpack(value)
    except (BufferError, RuntimeError, TypeError) as error:
        raise InputError(
            f"input '{name}' cannot be read through DLPack: {_first_line(error)}"
        ) from None


def _through_dlpack(value: Any) -> np.ndarray:
    # Other packages write their names before it: torch.bfloat16.
    if str(getattr(value, "dtype", "")).endswith(_BFLOAT16):
        import tvm_ffi

        return array_of(tvm_ffi.from_dlpack(value))
    return np.from_dlpack(value)


def _hand_out(tensor: Any, is_fresh: bool) -> np.ndarray:
    """Give the caller an array of his own: the runtime's memory if nobody else has it."""
    array = array_of(tensor)
    return array if is_fresh and array.flags.writeable else np.array(array)


# NumPy has this type from the package ml_dtypes, and DLPack does not pass it on: tensors of it go
# in and out as the bits that they are.
_BFLOAT16 = "bfloat16"


def _seen_as(tensor: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Return the same memory as a tensor of another type of the same size."""
    import tvm_ffi

    return tvm_ffi.get_global_func("runtime.TVMTensorCreateView")(tensor, shape, dtype, 0)


def _usable(cpus: Sequence[int]) -> tuple[int, ...]:
    cores = available_cores()
    unknown = [cpu for cpu in cpus if cpu not in cores]
    if unknown or not cpus:
        which = f"no core {unknown[0]}" if unknown else "none of no cores"
        raise InputError(f"this process may use {which}; it has {', '.join(map(str, cores))}")
    return tuple(sorted(set(cpus)))


def _flatten(result: Any) -> list[Any]:
    if hasattr(result, "__dlpack__"):
        return [result]
    return [tensor for item in result for tensor in _flatten(item)]


def _summarise(
    runs: Sequence[Sequence[tuple[str, float]]], totals: Sequence[float], manifest: Manifest
) -> Profile:
    symbols = [symbol for symbol, _ in runs[0]]
    times = [statistics.median(run[i][1] for run in runs) * 1e6 for i in range(len(symbols))]
    by_symbol: dict[str, list[float]] = {}
    for symbol, microseconds in zip(symbols, times, strict=True):
        by_symbol.setdefault(symbol, []).append(microseconds)
    layers: dict[str, float] = {}
    rows = []
    for symbol, each in by_symbol.items():
        names = manifest.kernels.get(symbol, ())
        rows.append(KernelTime(symbol, len(each), sum(each), names))
        for name, microseconds in _share(names, each):
            layers[name] = layers.get(name, 0.0) + microseconds
    rows.sort(key=lambda row: -row.microseconds)
    report = _measured_report(manifest, layers) if manifest.report else None
    return Profile(tuple(rows), layers, statistics.median(totals) * 1e6, report)


def _share(names: Sequence[str], each: Sequence[float]) -> list[tuple[str, float]]:
    """Give each call to the layer that made it, or evenly to the layers that it is.

    No guess where calls and names do not match.
    """
    if len(names) == 1:
        return [(names[0], sum(each))]
    layers, odd = divmod(len(names), len(each))
    if odd or not layers:
        return []
    return [(name, each[number // layers] / layers) for number, name in enumerate(names)]


def _measured_report(manifest: Manifest, layers: Mapping[str, float]) -> Report:
    from .report import Report

    report = Report.from_json(json.dumps(manifest.report))
    rows = (replace(row, measured_us=layers.get(row.name)) for row in report.layers)
    return replace(report, layers=tuple(rows))


def _shape(spec: TensorSpec) -> str:
    inner = ", ".join(str(dim) for dim in spec.shape)
    return f"({inner},)" if len(spec.shape) == 1 else f"({inner})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
