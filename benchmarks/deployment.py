"""Measure what loading and running a large model takes: seconds, memory of one and two processes.

    python benchmarks/deployment.py         # needs a C++ compiler, 2 GB of disk, and quiet

BERT-base's encoder, with 90 % zeros and with none (340 MB of weights), packaged twice: as `package`
does it, with the weights as read-only data of the library, and with weights that TVM's virtual
machine copies as it loads ("copied"), which is how TVM itself exports. Every number is of a process
of its own with nothing but NumPy, apache-tvm-ffi and the package's `load.py`, after one that warmed
the page cache. Writes benchmarks/results/deployment.json and the table of docs/deploy.md.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from networks import pruned, rewrite_page
from tvm_sparse.passes import take_out_constants

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.cpu_features import machine_identity
from tvm_sparse.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "deployment.json"
PAGE = ROOT / "docs" / "deploy.md"
MARKS = "<!-- deployment:begin -->", "<!-- deployment:end -->"

SPARSITIES = (0.9, 0.0)
REPEATS = 5
# More bytes than any constant has: all stay with the virtual machine.
NONE_TAKEN = 1 << 60

# Loads, runs twice, says what it took, and stays until it is told to end.
CHILD = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np, tvm_ffi, load

def status(key):
    text = open("/proc/self/status").read()
    return int(text.split(key + ":")[1].split()[0]) << 10

imports = status("VmHWM")
start = time.perf_counter()
model = load.load(threads=1)
loaded = time.perf_counter()
x = np.load(sys.argv[2])
model(x)
first = time.perf_counter()
model(x)
second = time.perf_counter()
print(json.dumps({
    "load_seconds": loaded - start,
    "first_run_seconds": first - loaded,
    "second_run_seconds": second - first,
    "imports_bytes": imports,
    "peak_bytes": status("VmHWM"),
    "anonymous_bytes": status("RssAnon"),
}), flush=True)
sys.stdin.readline()
"""


def start(package: Path, x: Path) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """Start a child, and return it with what it says once it has run the model."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(package), str(x)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    return child, json.loads(child.stdout.readline())


def mapped(child: subprocess.Popen[str], library: Path) -> dict[str, int]:
    """Sum up what a child's mappings of the library hold, in bytes by smaps' names."""
    # A page is dirty as long as the file that was just written is not on the disk.
    kinds = ("Rss", "Pss", "Shared_Clean", "Shared_Dirty", "Private_Clean", "Private_Dirty")
    sums = dict.fromkeys(kinds, 0)
    is_library = False
    for line in Path(f"/proc/{child.pid}/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if "-" in line.split()[0]:
            is_library = line.endswith(str(library))
        elif is_library and key in sums:
            sums[key] += int(rest.split()[0]) << 10
    return sums


def memory_of(child: subprocess.Popen[str]) -> int:
    """Return a child's proportional set size: what it shares counts by its share."""
    text = Path(f"/proc/{child.pid}/smaps_rollup").read_text()
    return int(text.split("\nPss:")[1].split()[0]) << 10


def end(*children: subprocess.Popen[str]) -> None:
    for child in children:
        child.communicate("\n")


def measure_python(package: Path, x: Path) -> dict[str, Any]:
    """Load one package in a process alone, several times, and in two at once."""
    end(start(package, x)[0])
    said = []
    for _ in range(REPEATS):
        child, numbers = start(package, x)
        alone = memory_of(child)
        end(child)
        said.append({**numbers, "proportional_bytes": alone})
    medians = {key: statistics.median(each[key] for each in said) for key in said[0]}
    pair = [start(package, x)[0] for _ in range(2)]
    both = {
        "two_processes_bytes": sum(map(memory_of, pair)),
        "library_in_each_of_two": mapped(pair[0], package / "model.so"),
    }
    end(*pair)
    return {**medians, **both}


def measure_cpp(package: Path, x: Path, name: str, folder: Path) -> dict[str, Any]:
    """Run the C++ example: from start to end, and once for longer, to read its peak meanwhile."""
    build = folder / "build"
    if not build.exists():
        for command in (["-S", str(package / "cpp"), "-B", str(build)], ["--build", str(build)]):
            subprocess.run(["cmake", *command], check=True, stdout=subprocess.DEVNULL)
    command = [str(build / "example"), str(package), f"{name}={x}", "--threads", "1"]
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        subprocess.run([*command, "--repeat", "1"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    child = subprocess.Popen([*command, "--repeat", "100"], stdout=subprocess.PIPE, text=True)
    peak = 0
    while child.poll() is None:
        text = Path(f"/proc/{child.pid}/status").read_text()
        if "VmHWM:" in text:
            peak = max(peak, int(text.split("VmHWM:")[1].split()[0]) << 10)
        time.sleep(0.02)
    said = child.communicate()[0]
    return {
        "start_and_two_runs_seconds": statistics.median(seconds[1:]),
        "peak_bytes": peak,
        "median_ms": float(said.split("median ")[1].split()[0]),
    }


def measure(sparsity: float, is_mapped: bool, folder: Path) -> dict[str, Any]:
    """Compile, package and measure one model."""
    least, take_out_constants.LEAST_BYTES = take_out_constants.LEAST_BYTES, NONE_TAKEN
    if is_mapped:
        take_out_constants.LEAST_BYTES = least
    try:
        model = zoo.bert_encoder()
        module = ts.compile(pruned(model, sparsity) if sparsity else model, threads=1, check=False)
    finally:
        take_out_constants.LEAST_BYTES = least
    library, package, x = folder / "model.so", folder / "package", folder / "x.npy"
    began = time.perf_counter()
    module.export(library)
    exported = time.perf_counter() - began
    ts.package(library, package, cpp=True)
    spec = module.inputs[0]
    np.save(x, np.random.default_rng(0).standard_normal(spec.shape).astype(np.float32))
    return {
        "sparsity": sparsity,
        "weights": "mapped" if is_mapped else "copied",
        "export_seconds": exported,
        "library_bytes": library.stat().st_size,
        "python": measure_python(package, x),
        "cpp": measure_cpp(package, x, spec.name, folder),
    }


def table(cases: list[dict[str, Any]]) -> str:
    """Write the results as Markdown."""
    lines = [
        "| zeros | weights | library, MB | load, ms | first run, ms | next run, ms | "
        "peak, MB (imports) | two processes, MB | C++: peak, MB |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in cases:
        found = case["python"]
        cells = [
            f"{case['sparsity']:.0%}",
            case["weights"],
            f"{case['library_bytes'] / 1e6:.0f}",
            f"{found['load_seconds'] * 1e3:.0f}",
            f"{found['first_run_seconds'] * 1e3:.0f}",
            f"{found['second_run_seconds'] * 1e3:.1f}",
            f"{found['peak_bytes'] / 1e6:.0f} ({found['imports_bytes'] / 1e6:.0f})",
            f"{found['two_processes_bytes'] / 1e6:.0f}",
            f"{case['cpp']['peak_bytes'] / 1e6:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    cases = []
    for sparsity in SPARSITIES:
        for is_mapped in (True, False):
            with tempfile.TemporaryDirectory(prefix="tvm-sparse-deployment-") as folder:
                cases.append(measure(sparsity, is_mapped, Path(folder)))
    result = {
        "network": "BERT-base encoder, 128 tokens",
        "machine": machine_identity(),
        "python": platform.python_version(),
        "tvm_sparse": ts.__version__,
        "page_bytes": os.sysconf("SC_PAGE_SIZE"),
        "cases": cases,
    }
    write_text(RESULTS, json.dumps(result, indent=1) + "\n")
    text = f"{table(cases)}\n\n{result['network']}, 1 thread, {result['machine']}."
    print(text)
    rewrite_page(PAGE, text, MARKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
