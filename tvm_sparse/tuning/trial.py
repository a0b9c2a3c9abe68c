"""One candidate: built, held against float64, and timed; here or on a machine that a tracker lends.

A candidate is called on several weights in turn, by a small Relax program whose time TVM's own
evaluator takes: the same code runs here and over RPC.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..check import compare, rounded_bound, typed_dot_bound
from ..cuda_toolkit import machine_code
from ..epilogue_reference import evaluate64
from ..errors import TuningError, last_line
from ..float64 import ConvAttributes, conv2d64, matmul64
from ..formats import FORMATS
from ..schedules.lookup import template_named
from ..targets import CudaMachine, Machine, resolve_target
from ..workload import Conv2dGeometry
from .job import Job

# Beyond this many multiply-adds, some output features of the reference are computed only.
_REFERENCE_MACS = 400_000_000
_FEWEST_FEATURES = 16

_SHORTEST_SAMPLE = 1e-3
_FEWEST_SAMPLES, _MOST_SAMPLES = 5, 60
# The median is known well enough when its notch is this narrow.
_PRECISION = 0.015


class WrongResultError(TuningError):
    """A candidate computes something else than its layer."""


class DeviceLostError(TuningError):
    """A device answers no more; the candidate may be as good as any."""


class NoDeviceError(TuningError):
    """The tracker lends no machine, or none that has what is needed."""


class Device(Protocol):
    """Where candidates run."""

    def open(self, executable: Any) -> Any:
        """Bring a program to the device; return its virtual machine."""

    def array(self, values: np.ndarray) -> Any:
        """Copy an array to the device."""

    @property
    def device(self) -> Any:
        """TVM's name for it."""

    @property
    def may_be_lost(self) -> bool:
        """Whether errors on it say more about the device than about the candidate."""

    def answers(self) -> bool:
        """Whether it can still be used after a candidate's error."""


class LocalDevice:
    """The process that asks, or the GPU of its machine.

    Parameters
    ----------
    kind : str
        "cpu" or "cuda".
    """

    may_be_lost = False

    def __init__(self, kind: str = "cpu") -> None:
        import tvm

        self.device = tvm.device(kind)

    def answers(self) -> bool:
        """Whether it can still be used: a kernel that went astray ends a GPU's whole context."""
        try:
            self.device.sync()
        except (RuntimeError, ValueError):
            return False
        return True

    def open(self, executable: Any) -> Any:
        """Run the program in this process."""
        from tvm import relax

        return relax.VirtualMachine(executable, self.device)

    def array(self, values: np.ndarray) -> Any:
        """Copy an array to aligned memory."""
        import tvm

        return tvm.runtime.tensor(np.ascontiguousarray(values), self.device)


class LentDevice:
    """A machine that an RPC tracker lends, for as long as the session lives.

    Parameters
    ----------
    host, port, key
        The tracker, and what kind of machine to ask it for.
    seconds : float
        After how long the server ends the session by itself.
    threads : int
        Threads that kernels may use there.
    kind : str
        What of the machine they run on: "cpu" or "cuda".

    Raises
    ------
    NoDeviceError
        When the machine has no GPU that TVM reaches, and one is asked for.
    """

    may_be_lost = True

    def __init__(
        self, host: str, port: int, key: str, seconds: float, threads: int, kind: str = "cpu"
    ) -> None:
        from tvm import rpc

        tracker = rpc.connect_tracker(host, port)
        self.session = tracker.request(key, priority=1, session_timeout=math.ceil(seconds))
        self.device = self.session.device(kind)
        if kind != "cpu" and not self.device.exist:
            self.close()
            raise NoDeviceError(
                f"the machine that was lent under the key '{key}' has no NVIDIA GPU that its "
                "TVM reaches"
            )
        self.session.get_function("runtime.config_threadpool")(1, threads)
        self._numbers = 0

    def answers(self) -> bool:
        """Whether it can still be used: the session is another one for the next candidate."""
        return True

    def close(self) -> None:
        """End the session."""
        try:
            self.session.get_function("CloseRPCConnection")()
        except (RuntimeError, OSError, EOFError, ValueError):
            # It is lost already.
            pass

    def open(self, executable: Any) -> Any:
        """Send the program as a library and load it there."""
        from tvm import relax

        self._numbers += 1
        name = f"candidate{self._numbers}.so"
        with tempfile.TemporaryDirectory(prefix="tvm-sparse-") as folder:
            path = Path(folder, name)
            executable.export_library(str(path))
            self.session.upload(str(path))
        library = self.session.load_module(name)
        self.session.remove(name)
        return relax.VirtualMachine(library, self.device)

    def array(self, values: np.ndarray) -> Any:
        """Send an array."""
        import tvm

        return tvm.runtime.tensor(np.ascontiguousarray(values), self.device)


@dataclass
class Prepared:
    """A candidate that is right, ready to be timed."""

    machine: Any
    error_share: float
    turns: int = 1


class Bench:
    """One job, on one device at a time."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.target = resolve_target(dict(job.target))
        self.kind = "cuda" if self.target.kind.name == "cuda" else "cpu"
        self.dtype = _numpy_type(job.workload.dtype)
        rng = np.random.default_rng(7)
        x_shape, y_shape = job.shapes
        self.x = rng.standard_normal(x_shape, np.float32).astype(self.dtype)
        self.tensors = [
            rng.standard_normal(y_shape, np.float32).astype(self.dtype)
            for _ in range(job.workload.epilogue.tensors)
        ]
        self.device: Any = None
        self._reference: tuple[Any, np.ndarray, np.ndarray] | None = None

    def use(self, device: Device) -> None:
        """Put the activations on a device; candidates run there from now on."""
        self.device = device
        with self._on_device():
            self.inputs = [device.array(array) for array in (self.x, *self.tensors)]
            self.result = device.array(np.zeros(self.job.shapes[1], self.dtype))

    def give_back(self) -> None:
        """Let go of the device; a lent one is free for others then."""
        device, self.device = self.device, None
        self.inputs, self.result = [], None
        if isinstance(device, LentDevice):
            device.close()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Tell errors of a device that may be lost from those of a candidate.

        A device that a candidate has ruined ends this process with it: the next one gets another.
        """
        try:
            yield
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            if not self.device.may_be_lost:
                if not self.device.answers():
                    raise SystemExit(f"the device is lost: {last_line(error)}") from error
                raise
            raise DeviceLostError(f"the device was lost: {last_line(error)}") from error

    def prepare(self, kernel: str, config: Mapping[str, Any]) -> Prepared:
        """Build a candidate, run it once and check its result.

        Raises
        ------
        WrongResultError
            When it is off by more than rounding explains.
        DeviceLostError
            When the device, and not the candidate, failed.
        """
        executable = self.build(kernel, config)
        with self._on_device():
            machine = self.device.open(executable)
            # Results of a plain call cannot come back over RPC.
            machine.set_input("main", *self.inputs, self.result)
            machine.invoke_stateful("main")
            got = machine.get_outputs("main").numpy()
        return Prepared(machine, self._check(got))

    def build(self, kernel: str, config: Mapping[str, Any]) -> Any:
        """Compile a candidate, machine code included; needs no device."""
        import tvm
        from tvm.relax.backend.cpu_generic import pipeline as stock

        passes = tvm.transform.Sequential(
            [*stock.dataflow_lower_passes(self.target), *stock.finalize_passes(self.target)]
        )
        with _machine_code_for(self.job.machine):
            return tvm.compile(self._program(kernel, config), self.target, relax_pipeline=passes)

    def _program(self, kernel: str, config: Mapping[str, Any]) -> Any:
        """Call the kernel with one weight after the other, each time on the same activations."""
        from tvm import relax

        job, template = self.job, template_named(kernel)
        weight_format = FORMATS[template.format]
        builder, symbol = relax.BlockBuilder(), None
        dtype = job.workload.dtype
        types = [relax.TensorType(array.shape, dtype) for array in (self.x, *self.tensors)]
        y_type = relax.TensorType(job.shapes[1], dtype)
        inputs = [relax.Var(f"x{i}", kind) for i, kind in enumerate(types)]
        y = relax.Var("y", y_type)
        channels = [relax.const(np.ascontiguousarray(c)) for c in job.channels]
        with builder.function("main", [*inputs, y]):
            with builder.dataflow():
                current: Any = y
                for weight in job.weights:
                    holds = weight_format.supports(weight, config)
                    if not holds:
                        raise TuningError(holds.reason)
                    packed = weight_format.pack(weight, config)
                    if symbol is None:
                        function = template.build(job.workload, job.machine, packed, config)
                        symbol = builder.add_func(
                            function.with_attr("global_symbol", "kernel"), "kernel"
                        )
                    arrays = template.arguments(job.workload, packed)
                    arguments = [
                        inputs[0], *map(relax.const, arrays), *channels, *inputs[1:], current
                    ]  # fmt: skip
                    current = builder.emit(
                        relax.op.call_tir_inplace(
                            symbol, relax.Tuple(arguments), [len(arguments) - 1], out_ty=y_type
                        )
                    )
                result = builder.emit_output(current)
            builder.emit_func_output(result)
        return builder.get()

    def _check(self, got: np.ndarray) -> float:
        picked, want, bound = self._expected()
        check = compare("candidate", got[:, picked], want, bound)
        if not check.ok:
            raise WrongResultError(
                f"off by {check.max_error:.3g}, {check.max_ratio:.3g} times what rounding explains"
            )
        return check.max_ratio

    def _expected(self) -> tuple[Any, np.ndarray, np.ndarray]:
        """Compute result and bound of the last weight, of some output features where all are dear.

        Features are the second axis of a matrix of results, and of images.
        """
        if self._reference is None:
            self._reference = self._compute_expected()
        return self._reference

    def _compute_expected(self) -> tuple[Any, np.ndarray, np.ndarray]:
        job, weight = self.job, np.asarray(self.job.weights[-1])
        geometry = job.concrete
        grouped = isinstance(geometry, Conv2dGeometry) and geometry.groups > 1
        features = len(weight)
        picked: Any = slice(None)
        if geometry.macs() > _REFERENCE_MACS and not grouped:
            count = max(_FEWEST_FEATURES, features * _REFERENCE_MACS // geometry.macs())
            picked = sorted({int(f) for f in np.linspace(0, features - 1, count)})
            weight = weight[picked]
        terms: Any = np.count_nonzero(weight, axis=1)
        if isinstance(geometry, Conv2dGeometry):
            g = geometry
            conv = ConvAttributes(g.strides, g.padding, g.dilation, g.groups)
            image = weight.reshape(len(weight), g.in_channels // g.groups, *g.kernel)
            value = conv2d64(self.x, image, conv)
            magnitude = conv2d64(np.abs(self.x), np.abs(image), conv)
            terms = terms[:, None, None]
        else:
            value = matmul64(self.x, weight.T)
            magnitude = matmul64(np.abs(self.x), np.abs(weight.T))
        trailing, dtype = (1,) * (value.ndim - 2), job.workload.dtype
        on_gpu = isinstance(job.machine, CudaMachine)
        want, bound = evaluate64(
            job.workload.epilogue,
            value,
            typed_dot_bound(magnitude, terms, dtype, on_tensor_cores=on_gpu),
            [np.asarray(c)[picked].reshape(-1, *trailing) for c in job.channels],
            [tensor[:, picked] for tensor in self.tensors],
        )
        return picked, want, rounded_bound(want, bound, dtype)

    def sample(self, prepared: Prepared, count: int) -> list[float]:
        """Return microseconds of one kernel call, `count` times."""
        weights = len(self.job.weights)
        with self._on_device():
            evaluate = prepared.machine.time_evaluator(
                "invoke_stateful", self.device.device, number=prepared.turns, repeat=count
            )
            return [t / weights * 1e6 for t in evaluate("main").results]

    def time(self, prepared: Prepared, seconds: float) -> list[float]:
        """Sample until the median is known well, or the time is over."""
        weights = len(self.job.weights)
        once = self.sample(prepared, 1)[0] * weights * 1e-6
        prepared.turns = max(1, math.ceil(_SHORTEST_SAMPLE / max(once, 1e-7)))
        samples: list[float] = []
        end = time.perf_counter() + seconds
        while len(samples) < _MOST_SAMPLES:
            samples += self.sample(prepared, _FEWEST_SAMPLES)
            if notch(samples) < _PRECISION or time.perf_counter() > end:
                break
        return samples


@contextmanager
def _machine_code_for(machine: Machine) -> Iterator[None]:
    if not isinstance(machine, CudaMachine):
        yield
        return
    with machine_code(machine.arch):
        yield


def _numpy_type(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    low, median, high = np.percentile(samples, [25, 50, 75]).tolist()
    return low, median, high


def notch(samples: Sequence[float]) -> float:
    """Return half the width of the median's 95 % interval, as a share of the median.

    R. McGill, J. W. Tukey, W. A. Larsen, "Variations of Box Plots", The American Statistician
    32(1), 1978.
    """
    low, median, high = quartiles(samples)
    return 1.57 * (high - low) / math.sqrt(len(samples)) / median if median else math.inf


def race(bench: Bench, candidates: Sequence[Prepared], seconds: float) -> list[list[float]]:
    """Time candidates in turn until the fastest is told apart from the next, or time is over."""
    samples: list[list[float]] = [[] for _ in candidates]
    end = time.perf_counter() + seconds
    turn = 0
    while time.perf_counter() < end:
        order = [(turn + i) % len(candidates) for i in range(len(candidates))]
        for index in order:
            samples[index] += bench.sample(candidates[index], 1)
        turn += 1
        if turn >= _FEWEST_SAMPLES and (turn >= _MOST_SAMPLES or _separated(samples)):
            break
    return samples


def _separated(samples: Sequence[Sequence[float]]) -> bool:
    """Whether the intervals of the two smallest medians do not touch."""
    medians = [statistics.median(s) for s in samples]
    first, second = np.argsort(medians)[:2] if len(samples) > 1 else (0, 0)
    if first == second:
        return True
    above = medians[first] * (1 + notch(samples[first]))
    return bool(above < medians[second] * (1 - notch(samples[second])))
