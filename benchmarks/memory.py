"""Measure what running a network takes in memory, beside ONNX Runtime.

    python benchmarks/memory.py         # BERT-base and ResNet-50 at 90 % zeros

Every system runs the network in a process of its own that does nothing else: the exported library
with TVM's runtime, the ONNX file with ONNX Runtime. What counts is the process's largest resident
set, with what importing the packages takes said beside it. Writes benchmarks/results/memory.json
and the table of docs/networks.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
from networks import NETWORKS, PAGE, pruned, rewrite_page

import tvm_sparse as ts
from tvm_sparse.files import write_text

RESULTS = Path(__file__).resolve().parent / "results" / "memory.json"
BEGIN, END = "<!-- memory:begin -->", "<!-- memory:end -->"
SPARSITY = 0.9

TITLES = ("BERT-base encoder, 128 tokens", "ResNet-50")

# Of this program alone: what getrusage says counts the process that it was forked from.
_PEAK = """
status = open('/proc/self/status').read()
print(int(status.split('VmHWM:')[1].split()[0]) * 1024)
"""
_IMPORTS = {
    "tvm_sparse": "import sys, numpy as np\nfrom tvm_sparse import load_module\n",
    "onnxruntime": "import sys, numpy as np, onnxruntime\n",
}
# Runs five times on ones: the shapes are those of the networks' only input.
_RUNS = {
    "tvm_sparse": """
module = load_module(sys.argv[1], threads=1)
x = np.ones(module.inputs[0].shape, 'float32')
for _ in range(5):
    module(x)
""",
    "onnxruntime": """
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])
given = session.get_inputs()[0]
x = np.ones(given.shape, 'float32')
for _ in range(5):
    session.run(None, {given.name: x})
""",
}


def peak_bytes(system: str, file: Path | None) -> int:
    """Run a file in a child, or only the imports, and return its largest resident set."""
    code = _IMPORTS[system] + (_RUNS[system] if file else "import tvm_sparse.runtime\n")
    if system == "onnxruntime" and not file:
        code = _IMPORTS[system]
    command = [sys.executable, "-c", f"{code}{_PEAK}", str(file or "")]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(model: onnx.ModelProto, folder: Path) -> dict[str, dict[str, int]]:
    """Measure one network on both systems."""
    sparse = pruned(model, SPARSITY)
    files = {"tvm_sparse": folder / "model.so", "onnxruntime": folder / "model.onnx"}
    onnx.save(sparse, files["onnxruntime"])
    ts.compile(sparse, threads=1, check=False).export(files["tvm_sparse"])
    return {
        name: {
            "peak": peak_bytes(name, file),
            "imports": peak_bytes(name, None),
            "file": file.stat().st_size,
        }
        for name, file in files.items()
    }


def table(results: dict[str, dict[str, dict[str, int]]]) -> str:
    """Write the results as Markdown."""
    lines = [
        "| 90 % zeros, 1 thread | tvm_sparse: peak, MB (imports; file) | "
        "ONNX Runtime: peak, MB (imports; file) | share |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, systems in results.items():
        cells = [
            f"{s['peak'] / 1e6:.0f} ({s['imports'] / 1e6:.0f}; {s['file'] / 1e6:.0f})"
            for s in systems.values()
        ]
        share = systems["tvm_sparse"]["peak"] / systems["onnxruntime"]["peak"]
        lines.append(f"| {name} | {' | '.join(cells)} | {share:.2f} |")
    return "\n".join(lines)


def main() -> int:
    results = {}
    for network in NETWORKS:
        if network.title in TITLES:
            with tempfile.TemporaryDirectory(prefix="tvm-sparse-memory-") as folder:
                results[network.title] = measure(network.build(), Path(folder))
    write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    text = table(results)
    print(text)
    rewrite_page(PAGE, text, (BEGIN, END))
    return 0


if __name__ == "__main__":
    sys.exit(main())
