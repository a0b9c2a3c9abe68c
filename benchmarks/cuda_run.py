"""Time what `cuda_build.py` compiled, beside peers: TVM's runtime, NumPy, and peers if there are.

Neither TVM's compiler nor the package `tvm` is loaded.
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cuda_peers
import numpy as np
from cuda_cases import Case
from cuda_timing import Clock, Gpu, clocks, interleaved, quick_look, rotation_for
from results import Store
from timing import Spread

import tvm_sparse as ts
from tvm_sparse.check import LayerCheck, compare, rounded_bound, typed_dot_bound
from tvm_sparse.cuda_toolkit import has_gpu
from tvm_sparse.device import CPU, CUDA, machine_devices, moved
from tvm_sparse.errors import SparseError
from tvm_sparse.float64 import ConvAttributes, conv2d64, matmul64
from tvm_sparse.workload import MatmulGeometry

# Multiply-adds that the float64 reference may take for each of its two cuts.
_REFERENCE_MACS = 2_000_000_000
_FEWEST = 16
# Copies of a layer, its activations and results may take this much memory of the GPU.
_MOST_BYTES = 16 << 30
# A peer may round more than we do; one that is this far off computes something else.
_PEER_TOLERANCE = 0.02
_OURS = "ours"


@dataclass(frozen=True)
class Asked:
    """A speed that this project was asked for.

    Attributes
    ----------
    groups : tuple of str
        Beginnings of the names of cases that it speaks of.
    zeros : float or None
        Share of zeros that it speaks of; None for any.
    peer : str
        Whom to beat.
    ratio : float
        Peer's time over ours, at least.
    """

    title: str
    groups: tuple[str, ...]
    zeros: float | None
    peer: str
    ratio: float

    def line(self, cases: Sequence[Mapping[str, Any]]) -> str:
        """Compare with what was measured; the geometric mean decides."""
        ratios = [
            case["peers"][self.peer]["over_ours"]
            for case in cases
            if case["name"].startswith(self.groups)
            and (self.zeros is None or case["zeros"] == self.zeros)
            and self.peer in case.get("peers", {})
        ]
        head = f"{self.title}: asked {self.ratio:g}x {self.peer}"
        if not ratios:
            return f"not measured  {head}"
        mean = statistics.geometric_mean(ratios)
        word = "met   " if mean >= self.ratio else "MISSED"
        reached = sum(ratio >= self.ratio for ratio in ratios)
        return (
            f"{word} {head}, found {mean:.2f}x ({min(ratios):.2f} to {max(ratios):.2f}; "
            f"{reached} of {len(ratios)} layers reach it)"
        )


ASKED: tuple[Asked, ...] = (
    Asked("tile-wise, 75 % zeros", ("tile-wise/",), 0.75, "cublas", 1.95),
    Asked("direct convolution, lowered cuBLAS", ("direct-",), None, "cublas", 2.63),
    Asked("direct convolution, lowered cuSPARSE", ("direct-",), None, "cusparse", 3.07),
    Asked("2:4 from 4096^3 on", ("2:4/4096x", "2:4/8192x"), 0.5, "cublas", 1.5),
    Asked("2:4 from 4096^3 on", ("2:4/4096x", "2:4/8192x"), 0.5, "cusparselt", 0.9),
    Asked("unstructured float32, 90 % zeros", ("unstructured/",), 0.9, "cublas", 2.5),
    Asked("decoding, few tokens", ("decode/",), None, "cublas", 1.0),
)


def read_cases(folder: Path) -> dict[str, Any]:
    """Read ``cases.json``.

    Raises
    ------
    SparseError
        When there is none, or it is of another version.
    """
    try:
        data = json.loads((folder / "cases.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SparseError(f"'{folder}' holds no cases: {error}") from None
    if data.get("version") != 1:
        raise SparseError(f"'{folder}' was built by another version of this benchmark")
    return dict(data)


def weight_of(folder: Path, entry: Mapping[str, Any]) -> np.ndarray:
    """Read the weight that a kernel was built with, or draw it again.

    Raises
    ------
    SparseError
        When NumPy draws another one here.
    """
    if entry["weights"] and (folder / entry["weights"]).is_file():
        with np.load(folder / entry["weights"]) as file:
            weight: np.ndarray = file["weight"]
    else:
        weight = Case.from_data(dict(entry)).weight()
    found = hashlib.sha256(np.ascontiguousarray(weight).view(np.uint8).data).hexdigest()[:24]
    if found != entry["digest"]:
        raise SparseError("NumPy draws another weight here than when it was built; build with it")
    return weight


def run(
    folder: Path,
    peers: Sequence[str] = cuda_peers.PEERS,
    path: Path | None = None,
    *,
    pattern: Callable[[str], bool] = lambda name: True,
    asked: bool = False,
) -> int:
    """Check and time every case of a folder; write the figures as data.

    Returns
    -------
    int
        0, or 1 when there is no GPU, no case, or a kernel was wrong.
    """
    if not has_gpu():
        print(
            "timing needs an NVIDIA GPU with its driver, and this machine has none", file=sys.stderr
        )
        return 1
    data = read_cases(folder)
    gpu = Gpu()
    slug = "-".join(gpu.name.lower().replace("nvidia", "").split())
    default = Path(__file__).resolve().parent / "results" / f"cuda-{slug}.json"
    session = Session(folder, data, gpu, peers, Store(path or default))
    session.describe()
    entries = [e for e in data["cases"] if pattern(e["name"]) and e["group"] != "overhead"]
    for entry in entries:
        session.measure(entry)
    if asked:
        print()
        for target in ASKED:
            print(target.line(session.measured))
    return 0 if session.measured and not session.wrong else 1


class Session:
    """One run on one GPU."""

    def __init__(
        self, folder: Path, data: Mapping[str, Any], gpu: Gpu, peers: Sequence[str], store: Store
    ) -> None:
        self.folder, self.data, self.gpu, self.peers, self.store = folder, data, gpu, peers, store
        self.kind, self.missing = cuda_peers.find_peers()
        self.measured: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.overhead_us: float | None = None

    @cached_property
    def environment(self) -> dict[str, Any]:
        """What figures depend on beside the case."""
        return {
            "gpu": self.gpu.name,
            "capability": self.gpu.capability,
            "multiprocessors": self.gpu.multiprocessors,
            "l2_bytes": self.gpu.l2_bytes,
            "target": self.data["target"],
            "tvm": self.data["tvm"],
            "tvm_sparse": self.data["tvm_sparse"],
            "driver": clocks().get("driver_version", ""),
            "python": platform.python_version(),
            "peers": dict(cuda_peers.versions()),
        }

    def describe(self) -> None:
        """Say what is measured on, what is missing, and what calling costs."""
        machine = self.data["machine"]
        print(f"{self.gpu.name}, {self.gpu.multiprocessors} multiprocessors; {clocks() or ''}")
        if self.gpu.multiprocessors != machine["multiprocessors"]:
            print(f"ceilings are those of {machine['arch']}, which has other multiprocessors")
        if self.missing:
            print(self.missing)
        overhead = [e for e in self.data["cases"] if e["group"] == "overhead"]
        if overhead:
            case = Case.from_data(overhead[0])
            layer = Layer(self.folder, overhead[0]["libraries"][0], case, 2)
            self.overhead_us = 1e6 * quick_look(layer.calls, self.gpu)
            print(
                f"a call of a layer of next to no work: {self.overhead_us:.1f} us, from Python "
                "through TVM's virtual machine, launched by itself; figures near it measure calling"
            )
        print(
            "us a call, medians with quartiles; of each ceiling, which share was reached: bytes "
            "read and written once at the memory's rate, products with nonzeros at the units' rate"
        )

    def measure(self, entry: Mapping[str, Any]) -> None:
        """Check a case, time it beside its peers, print and keep the figures."""
        try:
            result = self._measure(entry)
        except (SparseError, RuntimeError, MemoryError, OSError) as error:
            print(f"{entry['name']}: not measured: {_first(error)}", flush=True)
            return
        if result is not None:
            self.measured.append(result)
            self.store.add(entry["group"], self.environment, result)
            print(line(result), flush=True)

    def _measure(self, entry: Mapping[str, Any]) -> dict[str, Any] | None:
        case, weight = Case.from_data(dict(entry)), weight_of(self.folder, entry)
        sides = sum(int(np.prod(shape)) for shape in case.shapes) * weight.itemsize
        packed = entry["libraries"][0]["packed_bytes"]
        affordable = max(2, _MOST_BYTES // (sides + packed + weight.nbytes))
        rotation = min(rotation_for(packed + sides, self.gpu.l2_bytes), affordable)
        reference = Reference(case, weight)
        chosen = self._fastest(entry, case, reference, rotation)
        if chosen is None:
            return None
        library, layer, check = chosen
        ways = self._ways(case, weight, layer.activations, reference)
        times = interleaved(
            {_OURS: layer.calls, **{name: way.calls for name, way in ways.items()}}, self.gpu
        )
        after = clocks()
        result = {
            "name": case.name,
            **{key: entry[key] for key in ("op", "dtype", "form", "zeros", "density", "nnz")},
            **{key: library[key] for key in ("kernel", "config", "expected_us", "packed_bytes")},
            "rotation": rotation,
            "error_share": check.max_ratio,
            "us": asdict(times.pop(_OURS)),
            "overhead_us": self.overhead_us,
            "clocks": after,
        }
        result["ceilings"] = ceilings(case, entry["nnz"], packed, self.data["machine"])
        result["peers"] = {
            name: over(spread, ways[name].name, result["us"]["median"])
            for name, spread in times.items()
        }
        return result

    def _fastest(
        self, entry: Mapping[str, Any], case: Case, reference: Reference, rotation: int
    ) -> tuple[Mapping[str, Any], Layer, LayerCheck] | None:
        """Choose among a case's libraries, by a quick look; wrong ones are never timed."""
        found: list[tuple[float, Mapping[str, Any], Layer, LayerCheck]] = []
        for library in entry["libraries"]:
            layer = Layer(self.folder, library, case, rotation)
            check = reference.check(case.name, layer.result())
            if not check.ok:
                self.wrong.append(case.name)
                print(
                    f"{case.name}: WRONG at {library['config']}: off by {check.max_error:.3g}, "
                    f"{check.max_ratio:.3g} times what rounding explains",
                    flush=True,
                )
                continue
            look = quick_look(layer.calls, self.gpu) if len(entry["libraries"]) > 1 else 0.0
            # Only the fastest so far is kept: each takes memory of the GPU.
            found = sorted([*found, (look, library, layer, check)], key=lambda entry: entry[0])[:1]
        return found[0][1:] if found else None

    def _ways(
        self, case: Case, weight: np.ndarray, activations: Sequence[Any], reference: Reference
    ) -> dict[str, cuda_peers.Way]:
        """Choose each peer's fastest way that computes this layer."""
        if self.kind is None or not self.peers:
            return {}
        source = self.kind(case, weight, activations)
        found: dict[str, cuda_peers.Way] = {}
        for peer in self.peers:
            try:
                for name, ways in source.ways(peer).items():
                    fitting = [way for way in ways if self._agrees(case, name, way, reference)]
                    if fitting:
                        found[name] = fastest_way(fitting, self.gpu)
            except cuda_peers.MissingPeerError as error:
                if peer in ("cublas", "cusparse"):
                    print(f"{case.name}: no {peer}: {error}")
            except (RuntimeError, ImportError, TypeError, AttributeError) as error:
                print(f"{case.name}: no {peer}: {_first(error)}")
        return found

    def _agrees(self, case: Case, name: str, way: cuda_peers.Way, reference: Reference) -> bool:
        distance = reference.distance(way.read(way.calls[0]()))
        if distance > _PEER_TOLERANCE:
            print(f"{case.name}: {name} ({way.name}) is off by {distance:.2g} and left out")
        return distance <= _PEER_TOLERANCE


def fastest_way(ways: Sequence[cuda_peers.Way], clock: Clock) -> cuda_peers.Way:
    """Choose by a quick look at each."""
    if len(ways) == 1:
        return ways[0]
    return min(ways, key=lambda way: quick_look(way.calls, clock))


class Layer:
    """A compiled layer on buffers of its own for each call in rotation.

    A virtual machine copies the weight to the GPU when it starts; each call has one of its own,
    and with it a copy of the weight.
    """

    def __init__(self, folder: Path, library: Mapping[str, Any], case: Case, rotation: int) -> None:
        import tvm_ffi

        module = ts.load_module(folder / library["file"])
        host = tvm_ffi.from_dlpack(_aligned(case.input()))
        self.activations = [moved(host, CUDA) for _ in range(rotation)]
        self.results: list[Any] = [None] * rotation
        self.machines = [module.library["vm_load_executable"]() for _ in range(rotation)]
        for machine in self.machines:
            machine["vm_initialization"](*machine_devices(CUDA))
        self.module = module
        self.calls = [self._call(number) for number in range(rotation)]

    def _call(self, number: int) -> Callable[[], None]:
        main, x, results = self.machines[number]["main"], self.activations[number], self.results

        def call() -> None:
            # Kept until its turn comes again, so that results rotate, too.
            results[number] = main(x)

        return call

    def result(self) -> np.ndarray:
        """Compute the layer once, and bring the result here."""
        self.calls[-1]()
        return np.from_dlpack(moved(self.results[-1], CPU))


def _aligned(array: np.ndarray) -> np.ndarray:
    from tvm_sparse.runtime import aligned_empty

    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


class Reference:
    """What a layer computes, in float64: some outputs for all columns, and all for some columns.

    The columns of a convolution are cut by images.
    """

    def __init__(self, case: Case, weight: np.ndarray) -> None:
        self.case = case
        x = case.input()
        share = _REFERENCE_MACS / max(case.geometry.macs(), 1)
        self.outputs = _spread_out(weight.shape[0], share, _FEWEST)
        few = 1 if case.op == "conv2d" else _FEWEST
        self.inputs = _spread_out(len(x), share, few)
        terms = np.count_nonzero(weight, axis=1)
        every = np.arange(weight.shape[0])
        self.cuts = [
            (np.arange(len(x)), self.outputs, *self._compute(x, weight, terms, self.outputs)),
            (self.inputs, every, *self._compute(x[self.inputs], weight, terms, every)),
        ]

    def _compute(
        self, x: np.ndarray, weight: np.ndarray, terms: np.ndarray, outputs: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        chosen, counts = weight[outputs], terms[outputs]
        g = self.case.geometry
        if isinstance(g, MatmulGeometry):
            value = matmul64(x, chosen.T)
            size = matmul64(np.abs(x), np.abs(chosen.T))
        else:
            conv = ConvAttributes(g.strides, g.padding, g.dilation, g.groups)
            images = chosen.reshape(len(chosen), g.in_channels // g.groups, *g.kernel)
            value = conv2d64(x, images, conv)
            size = conv2d64(np.abs(x), np.abs(images), conv)
            counts = counts[:, None, None]
        return value, bound_of(value, size, counts, self.case.dtype)

    def _cut(self, got: np.ndarray, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        return got[inputs][:, outputs]

    def check(self, name: str, got: np.ndarray) -> LayerCheck:
        """Hold a result against both cuts; the worse one counts."""
        checks = [
            compare(name, self._cut(got, inputs, outputs), value, bound)
            for inputs, outputs, value, bound in self.cuts
        ]
        return max(checks, key=lambda check: check.max_ratio)

    def distance(self, got: np.ndarray) -> float:
        """Return the largest error as a share of the largest result."""
        shares = []
        for inputs, outputs, value, _ in self.cuts:
            error = np.abs(self._cut(got, inputs, outputs).astype(np.float64) - value)
            shares.append(float(error.max() / np.abs(value).max()))
        return max(shares)


def bound_of(value: np.ndarray, size: np.ndarray, terms: np.ndarray, dtype: str) -> np.ndarray:
    """Bound the error of sums in float32 that are stored as `dtype`."""
    return rounded_bound(value, typed_dot_bound(size, terms, dtype, on_tensor_cores=True), dtype)


def _spread_out(length: int, share: float, fewest: int) -> np.ndarray:
    count = min(length, max(fewest, int(length * share)))
    return np.unique(np.linspace(0, length - 1, count).astype(int))


def ceilings(
    case: Case, nnz: int, packed_bytes: int, machine: Mapping[str, Any]
) -> dict[str, float | str]:
    """Return the microseconds that memory and arithmetic ask for at least, and which binds."""
    itemsize = np.dtype(case.dtype).itemsize
    moved_bytes = packed_bytes + sum(int(np.prod(s)) for s in case.shapes) * itemsize
    rate = machine["cores"] if case.dtype == "float32" else machine["tensor_macs"]
    by_bytes = moved_bytes / machine["memory_gbytes"] * 1e-3
    macs = nnz * case.columns
    by_flops = macs / (machine["multiprocessors"] * rate * machine["gigahertz"]) * 1e-3
    return {
        "bytes_us": round(by_bytes, 3),
        "flops_us": round(by_flops, 3),
        "binds": "bytes" if by_bytes > by_flops else "flops",
    }


def over(spread: Spread, way: str, ours: float) -> dict[str, Any]:
    """Describe a peer's time beside ours."""
    return {**asdict(spread), "way": way, "over_ours": round(spread.median / ours, 4)}


def line(result: Mapping[str, Any]) -> str:
    """Write a case's figures in one line."""
    us, limits = result["us"], result["ceilings"]
    parts = [
        f"{result['name']}: {us['median']:.1f} us ({us['low']:.1f} to {us['high']:.1f}; "
        f"{result['expected_us'] or 0:.1f} expected)",
        f"bytes {limits['bytes_us']:.1f} us ({limits['bytes_us'] / us['median']:.0%}), "
        f"flops {limits['flops_us']:.1f} us ({limits['flops_us'] / us['median']:.0%})",
    ]
    parts += [
        f"{name} {peer['median']:.1f} us ({peer['over_ours']:.2f}x)"
        for name, peer in result["peers"].items()
    ]
    return "; ".join(parts)


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
