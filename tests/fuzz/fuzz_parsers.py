"""The table of everything that reads a file, or a text, of a user; a new parser is a new row.

Both sides import it: the tests take valid files and their damage from it, the process that reads
them takes the readers.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import fuzz_onnx_models
import numpy as np
from fuzz_mutations import Files, damaged_bytes, damaged_data, damaged_onnx, to_text
from hypothesis import strategies as st

Damage = Callable[[Files], st.SearchStrategy[Files]]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@dataclass(frozen=True)
class Parser:
    """One reader of files.

    Attributes
    ----------
    seeds : callable
        Returns valid examples: each the files of a folder, by name.
    damage : callable
        Makes a strategy of damaged files out of valid ones.
    read : callable
        Reads the folder, in the child process; whatever is no SparseError is a finding.
    examples : int
        In the ordinary run, of all seeds together.
    """

    seeds: Callable[[], list[Files]]
    damage: Damage
    read: Callable[[Path], object]
    examples: int = 50


# ---------------------------------------------------------------------------------------------
# How files are damaged
# ---------------------------------------------------------------------------------------------


def in_bytes(files: Files) -> st.SearchStrategy[Files]:
    """Damage the bytes of one of the files."""
    return st.sampled_from(sorted(files)).flatmap(
        lambda name: damaged_bytes(files[name]).map(lambda data: {**files, name: data})
    )


def in_structure(*names: str, finish: Callable[[Any], Any] = lambda data: data) -> Damage:
    """Damage the values of JSON files; `finish` makes them consistent again."""

    def strategy(files: Files) -> st.SearchStrategy[Files]:
        def damaged(name: str) -> st.SearchStrategy[Files]:
            return damaged_data(json.loads(files[name])).map(
                lambda data: {**files, name: encoded(to_text(finish(data)))}
            )

        return st.sampled_from(names).flatmap(damaged)

    return strategy


def either(*damages: Damage) -> Damage:
    return lambda files: st.one_of([damage(files) for damage in damages])


def encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")


def in_fields(files: Files) -> st.SearchStrategy[Files]:
    """Damage the fields of a protobuf."""
    return damaged_onnx(files["model.onnx"]).map(lambda data: {**files, "model.onnx": data})


# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------


def onnx_seeds() -> list[Files]:
    models: list[Files] = [
        {"model.onnx": make().SerializeToString()} for make in fuzz_onnx_models.MODELS
    ]
    return [*models, fuzz_onnx_models.external()]


def load_model(folder: Path) -> object:
    import tvm_sparse as ts

    return str(ts.inspect(ts.load(folder / "model.onnx")))


def prune_model(folder: Path) -> object:
    from tvm_sparse.pruning import prune_with_report

    return str(prune_with_report(str(folder / "model.onnx"), sparsity=0.5, remove_channels=True))


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


def checkpoint_seeds() -> list[Files]:
    from safetensors.numpy import save

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 8)).astype(np.float32)
    kept = weight > 0
    packed = {
        "a.weight.shape": np.array(weight.shape, np.int64),
        "a.weight.compressed": weight[kept],
        "a.weight.bitmask": np.packbits(kept, axis=-1, bitorder="little"),
    }
    plain = {"b.weight_orig": weight, "b.weight_mask": kept, "c.bias": weight[0]}
    index = {"weight_map": {"b.weight_orig": "one.safetensors", "a.weight": "two.safetensors"}}
    return [
        {"one.safetensors": save(packed)},
        {"one.safetensors": save(plain), "two.safetensors": save(packed)},
        {
            "one.safetensors": save(plain),
            "two.safetensors": save(packed),
            "model.safetensors.index.json": json.dumps(index).encode(),
        },
    ]


def in_header(files: Files) -> st.SearchStrategy[Files]:
    """Damage the JSON at the beginning of a safetensors file; its length is told right."""

    def rewritten(data: Any, rest: bytes) -> bytes:
        header = encoded(to_text(data))
        return len(header).to_bytes(8, "little") + header + rest

    data = files["one.safetensors"]
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    return damaged_data(header).map(
        lambda found: {**files, "one.safetensors": rewritten(found, rest)}
    )


NAMES = tuple(
    f"{layer}{end}"
    for layer in ("a.weight", "b", "b.weight", "x_mask")
    for end in ("", "_orig", "_mask", ".shape", ".compressed", ".bitmask", ".mask", "_packed")
)
ELEMENTS = ("float32", "float16", "float64", "bool", "uint8", "int8", "int32", "int64")
CONTENTS = (0, 1, 2, 5, -1, 255, 2**31, 2**60)


def of_tensors(files: Files) -> st.SearchStrategy[Files]:
    """Whole files of tensors that hardly ever fit each other."""
    from safetensors.numpy import save

    def tensor(dtype: str, shape: list[int], content: int) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.full(shape, content, np.int64).astype(dtype)

    shapes = st.lists(st.sampled_from((0, 1, 2, 8)), max_size=3)
    tensors = st.builds(tensor, st.sampled_from(ELEMENTS), shapes, st.sampled_from(CONTENTS))
    several = st.dictionaries(st.sampled_from(NAMES), tensors, min_size=1, max_size=6)
    return several.map(lambda arrays: {"one.safetensors": save(arrays)})


def in_index(files: Files) -> st.SearchStrategy[Files]:
    name = "model.safetensors.index.json"
    return in_structure(name)(files) if name in files else in_bytes(files)


def read_checkpoint(folder: Path) -> object:
    import tvm_sparse as ts

    return str(ts.inspect(folder))


# ---------------------------------------------------------------------------------------------
# Plans, records, calibrations, reports
# ---------------------------------------------------------------------------------------------


def plan_seeds() -> list[Files]:
    from tvm_sparse.planner import Candidate, Decision, Plan

    sparse = Candidate("sliced_ell", "sliced_rows", {"nt": 2, "mr": 4}, 12.5)
    dense = Candidate("dense", "dense_panels", {"nt": 2}, 20.0)
    decisions = (
        Decision(
            "fc1",
            "matmul",
            "sliced_ell",
            "sliced_rows",
            {"nt": 2, "mr": 4},
            "model",
            "expected 1.6x faster",
            12.5,
            20.0,
            (sparse, dense),
        ),
        Decision("fc2", "matmul", "dense", "tvm", {}, "user", "kept dense by the user"),
    )
    plan = Plan({"kind": "llvm", "mcpu": "x86-64-v3"}, 2, "0f" * 8, decisions)
    return [{"plan.json": plan.to_json().encode()}]


def read_plan(folder: Path) -> object:
    from tvm_sparse.planner import Plan

    plan = Plan.from_json(folder / "plan.json")
    return str(plan) + plan.to_json()


def _subjects() -> list[Any]:
    from tvm_sparse.records import Statistics, Subject, code_digest
    from tvm_sparse.workload import (
        Conv2dGeometry,
        Epilogue,
        EpilogueOp,
        EpilogueRef,
        MatmulGeometry,
        Workload,
    )

    op = EpilogueOp("add", (EpilogueRef("acc"), EpilogueRef("channel", 0)))
    matmul = Workload("matmul", MatmulGeometry(48, 64, 32), "float32", Epilogue((op,), 1))
    conv = Workload("conv2d", Conv2dGeometry(1, 8, 9, 10, 16, (3, 2)))
    target = {"kind": "llvm", "mcpu": "x86-64-v3"}
    statistics = Statistics(48, 64, 0.125, 0.31, 0.42, "unstructured")
    return [
        Subject(workload, ("0f" * 12,), statistics, target, "here", code_digest(), "0.27.0")
        for workload in (matmul, conv)
    ]


def record_seeds() -> list[Files]:
    from tvm_sparse.records import VERSION, TuningRecord

    lines = []
    for subject in _subjects():
        record = TuningRecord(
            subject, "sliced_rows", {"nt": 2, "mr": 4}, "ok", 12.5, 12.0, 13.0, 40, 0.02, trial=1
        )
        lines.append(json.dumps({"version": VERSION, "key": record.key, **asdict(record)}))
    return [{"records.jsonl": "".join(f"{line}\n" for line in lines).encode()}]


def in_records(files: Files) -> st.SearchStrategy[Files]:
    """Damage the values of one line, whose key is made to fit again: it is no secret."""
    first, *others = files["records.jsonl"].decode().splitlines()

    def line_of(data: Any) -> str:
        return to_text(_with_fitting_key(data))

    return damaged_data(json.loads(first)).map(
        lambda data: {"records.jsonl": encoded("\n".join([line_of(data), *others]) + "\n")}
    )


def _with_fitting_key(data: Any) -> Any:
    from tvm_sparse.records import _digest

    try:
        parts = {"kernel": data["kernel"], "config": data["config"]}
        return {**data, "key": _digest({"subject": _digest(data["subject"]), **parts})}
    except (KeyError, TypeError, ValueError):
        return data


def read_records(folder: Path) -> object:
    from tvm_sparse.planner import decide
    from tvm_sparse.profile import profile_weight
    from tvm_sparse.records import Statistics, read_records
    from tvm_sparse.targets import machine_of, resolve_target
    from tvm_sparse.tuning.book import RecordBook, history_of

    file = read_records(folder / "records.jsonl")
    assert all(is_a_sentence(skipped) for skipped in file.skipped), file.skipped
    target = {"kind": "llvm", "mcpu": "x86-64-v3"}
    book = RecordBook(file, target, None, "0.27.0")
    weight = np.eye(48, 64, dtype=np.float32)
    profile = profile_weight(weight)
    machine = machine_of(resolve_target("x86-64-v3"), 1)
    for subject in _subjects():
        hints = book.similar(subject.workload, Statistics.of(profile))
        [hint.describe() for hint in hints]
    site = _site(_subjects()[0].workload)
    decide(site, profile, machine, book=book, digest="0f" * 12)
    return history_of(file.records)


def _site(workload: Any) -> Any:
    from tvm_sparse.ops import WeightSite

    return WeightSite("fc", "w", "y", workload, workload.geometry.weight_shape)


def calibration_seeds() -> list[Files]:
    from tvm_sparse.schedules.x86.cost import PRICE_NAMES

    from tvm_sparse.targets import resolve_target, target_data
    from tvm_sparse.tuning.calibrate import Calibration, calibration_path
    from tvm_sparse.tuning.core_speed import CoreSpeed

    target = resolve_target("x86-64-v3")
    found = Calibration(
        "here",
        target_data(target),
        "2026-01-01T00:00:00+00:00",
        3.5,
        CoreSpeed(100.0, 100.0, 50.0, 40.0, 10.0, None),
        dict.fromkeys(PRICE_NAMES, 1.5),
        99,
        0.05,
        0.1,
    )
    return [{calibration_path("here", target).name: found.to_json().encode()}]


def in_calibration(files: Files) -> st.SearchStrategy[Files]:
    return in_structure(*files)(files)


def read_calibration(folder: Path) -> object:
    from tvm_sparse.targets import resolve_target, x86_machine
    from tvm_sparse.tuning.calibrate import load_calibration

    os.environ["TVM_SPARSE_HOME"] = str(folder)
    target = resolve_target("x86-64-v3")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = load_calibration("here", target)
    assert all(is_a_sentence(str(warning.message)) for warning in said), said
    return None if found is None else (str(found), found.apply(x86_machine(target)))


def report_seeds() -> list[Files]:
    from tvm_sparse.report import LayerReport, Report

    layer = LayerReport("fc1", "matmul", (48, 64), "float32", 0.1, "unstructured", 307)
    report = Report("a model", layers=(layer,), notes=("a note",))
    return [{"report.json": report.to_json().encode()}]


def read_report(folder: Path) -> object:
    from tvm_sparse.report import Report

    text = (folder / "report.json").read_text(encoding="utf-8", errors="replace")
    return str(Report.from_json(text))


def bench_seeds() -> list[Files]:
    from tvm_sparse.bench import BenchCase, BenchResult, SystemTime

    case = BenchCase(
        "m", 1, 0.9, {"x": (1, 4)}, (0,), "onnxruntime", 5, (SystemTime("tvm_sparse", 1.5),)
    )
    result = BenchResult("a processor", "Linux", {"tvm-sparse": "0.1.0"}, "2026-01-01", (case,))
    return [{"bench.json": result.to_json().encode()}]


def read_bench(folder: Path) -> object:
    from tvm_sparse.bench import BenchResult

    text = (folder / "bench.json").read_text(encoding="utf-8", errors="replace")
    return str(BenchResult.from_json(text))


# ---------------------------------------------------------------------------------------------
# Libraries and packages
# ---------------------------------------------------------------------------------------------


def _manifest() -> Any:
    from tvm_sparse.manifest import Manifest
    from tvm_sparse.model import TensorSpec

    return Manifest(
        package_version="0.1.0",
        tvm_version="0.27.0",
        target={"kind": "llvm"},
        cpu_features=("avx2",),
        threads=2,
        inputs=(TensorSpec("x", ("batch", 4), "float32"),),
        outputs=(TensorSpec("y", ("batch", 3), "float32"),),
        plan={"layers": [1]},
        kernels={"spmm": ("fc1", "fc2")},
        fresh_outputs=(True,),
    )


def manifest_seeds() -> list[Files]:
    return [{"manifest.json": _manifest().to_json().encode()}]


def framed(data: bytes) -> bytes:
    """Frame a manifest as it stands in a library, checksum and all."""
    import hashlib

    from tvm_sparse.manifest import _LENGTH, _MARKER

    return _MARKER + _LENGTH.pack(len(data)) + hashlib.sha256(data).digest() + data


def read_framed_manifest(folder: Path) -> object:
    """Read the manifest out of a library that holds it, and what a runner does with it."""
    from tvm_sparse.dtypes import numpy_dtype
    from tvm_sparse.manifest import read_manifest
    from tvm_sparse.opening import check_processor
    from tvm_sparse.runtime import Runner

    library = folder / "model.so"
    library.write_bytes(b"\x7fELF" + framed((folder / "manifest.json").read_bytes()))
    manifest = read_manifest(library)
    check_processor(library, manifest)
    for spec in (*manifest.inputs, *manifest.outputs):
        numpy_dtype(spec.dtype)
    return Runner(None, manifest, refusal="not loaded")


def package_seeds() -> list[Files]:
    import hashlib

    from tvm_sparse.package_manifest import PackageManifest, PackedFile

    files = {
        name: PackedFile(hashlib.sha256(data).hexdigest(), len(data))
        for name, data in {"model.so": b"library", "load.py": b"loader"}.items()
    }
    manifest = PackageManifest("model.so", {"apache-tvm-ffi": "0.1"}, files, {}, _manifest())
    return [
        {
            "manifest.json": manifest.to_json().encode(),
            "model.so": b"library",
            "load.py": b"loader",
        }
    ]


def read_package(folder: Path) -> object:
    from tvm_sparse.package_manifest import library_of, verify_files

    verify_files(folder, True)
    return library_of(folder)


def library_seeds() -> list[Files]:
    """A small ELF file that is no library of this package, and one that says it is."""
    import struct

    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        3,
        0x3E,
        1,
        0,
        64,
        0,
        0,
        64,
        56,
        1,
        64,
        0,
        0,
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 120, 120, 4096)
    elf = header + segment
    return [{"model.so": elf}, {"model.so": elf + bytes(64) + framed(manifest_seeds_text())}]


def manifest_seeds_text() -> bytes:
    return manifest_seeds()[0]["manifest.json"]


def load_library(folder: Path) -> object:
    from tvm_sparse.deploy import load_module

    return load_module(folder / "model.so")


def cache_seeds() -> list[Files]:
    import hashlib

    entry = {"sha256": hashlib.sha256(b"library").hexdigest(), "about": {"model": "m.onnx"}}
    return [{"library.so": b"library", "entry.json": json.dumps(entry).encode()}]


def read_cache(folder: Path) -> object:
    from tvm_sparse.cache import LibraryCache

    store = LibraryCache(folder.parent)
    for library in store.entries():
        f"{library.about.get('model', 'damaged')} for {library.about.get('target', '?')}"
    found = store.find(folder.name)
    return None if found is None else found.about.get("model")


# ---------------------------------------------------------------------------------------------
# Arrays, matrices, targets
# ---------------------------------------------------------------------------------------------


def array_seeds() -> list[Files]:
    single, several = BytesIO(), BytesIO()
    np.save(single, np.arange(6, dtype=np.float32).reshape(2, 3))
    np.savez(several, x=np.zeros((2, 3), np.float32), y=np.ones(1))
    return [{"x.npy": single.getvalue()}, {"x.npy": several.getvalue()}]


def read_array(folder: Path) -> object:
    from tvm_sparse.cli import as_declared, read_inputs

    arrays = read_inputs([("x", str(folder / "x.npy"))], ["x"])
    return [as_declared(array, "bfloat16") for array in arrays.values()]


def matrix_seeds() -> list[Files]:
    return [{"m.smtx": b"3, 4, 5\n0 2 3 5 \n0 3 1 2 3 \n"}]


NUMBERS = [str(number).encode() for number in (-1, 0, 4, 2**40, 2**60, 2**63, 10**30)]


def in_numbers(files: Files) -> st.SearchStrategy[Files]:
    """Replace whole numbers of a text."""
    words = files["m.smtx"].replace(b",", b" ,").split(b" ")

    def replaced(place: int, number: bytes) -> Files:
        return {"m.smtx": b" ".join([*words[:place], number, *words[place + 1 :]])}

    return st.builds(replaced, st.integers(0, len(words) - 1), st.sampled_from(NUMBERS))


def read_matrix(folder: Path) -> object:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from smtx import read_smtx
    finally:
        sys.path.remove(str(BENCHMARKS))
    return read_smtx(folder / "m.smtx")


def target_seeds() -> list[Files]:
    from tvm_sparse.targets import SHORT_NAMES

    described = {"kind": "llvm", "mcpu": "x86-64-v3", "mattr": ["+avx2"], "keys": ["cpu"]}
    targets = [described, SHORT_NAMES["cuda-sm80"]]
    return [{"target": json.dumps(target).encode()} for target in targets]


def read_target(folder: Path) -> object:
    from tvm_sparse.cpu_features import required_features
    from tvm_sparse.targets import machine_of, resolve_target, target_data

    text = (folder / "target").read_bytes().decode("utf-8", errors="surrogateescape")
    target = resolve_target(text)
    machine = machine_of(target, 1)
    if target.kind.name == "llvm":
        required_features(target)
    return machine.name, target_data(target)


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------

PARSERS: Mapping[str, Parser] = {
    "model": Parser(onnx_seeds, either(*[in_fields] * 4, in_bytes), load_model, 150),
    "model to prune": Parser(onnx_seeds, either(*[in_fields] * 4, in_bytes), prune_model, 80),
    "checkpoint": Parser(
        checkpoint_seeds,
        either(in_header, of_tensors, of_tensors, in_index, in_bytes),
        read_checkpoint,
        120,
    ),
    "plan": Parser(plan_seeds, either(in_structure("plan.json"), in_bytes), read_plan, 100),
    "records": Parser(record_seeds, either(in_records, in_records, in_bytes), read_records, 120),
    "calibration": Parser(calibration_seeds, either(in_calibration, in_bytes), read_calibration),
    "report": Parser(report_seeds, either(in_structure("report.json"), in_bytes), read_report),
    "benchmark": Parser(bench_seeds, either(in_structure("bench.json"), in_bytes), read_bench),
    "manifest": Parser(
        manifest_seeds,
        either(in_structure("manifest.json"), in_bytes),
        read_framed_manifest,
        100,
    ),
    "package": Parser(package_seeds, either(in_structure("manifest.json"), in_bytes), read_package),
    "library": Parser(library_seeds, in_bytes, load_library),
    "cache": Parser(cache_seeds, either(in_structure("entry.json"), in_bytes), read_cache),
    "array": Parser(array_seeds, in_bytes, read_array),
    "matrix": Parser(matrix_seeds, either(in_numbers, in_bytes), read_matrix),
    "target": Parser(target_seeds, either(in_structure("target"), in_bytes), read_target),
}

# ---------------------------------------------------------------------------------------------
# The law
# ---------------------------------------------------------------------------------------------

LONGEST = 500


def is_a_sentence(text: str) -> bool:
    """Say whether a message is one sentence that a terminal can show."""
    return bool(text.strip()) and len(text) < LONGEST and text.isprintable()
