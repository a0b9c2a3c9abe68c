"""Run ONNX's own backend tests through this compiler and through plain TVM: nothing may be lost.

    python benchmarks/onnx_suite.py                     # all, half an hour; writes the results
    python benchmarks/onnx_suite.py --only softmax      # some, nothing is written

The tests are those that the onnx package brings along for every operator and its corners ("node"),
small graphs ("simple"), and the light models, whose weights stand in for the trained ones; a light
model's outputs are those of ONNX Runtime. A test passes when all outputs agree with the expected
ones within its own tolerance. Tests run in child processes, so that a crash costs one test.
Writes benchmarks/results/onnx_suite.json and the count in docs/networks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from networks import PAGE, rewrite_page
from onnx.backend.test.case import model as simple
from onnx.backend.test.case import node

from tvm_sparse import zoo
from tvm_sparse.files import write_text

RESULTS = Path(__file__).resolve().parent / "results" / "onnx_suite.json"
BEGIN, END = "<!-- onnx:begin -->", "<!-- onnx:end -->"
SYSTEMS = ("tvm", "tvm_sparse")
# Seconds that a test may take.
_PATIENCE = 120


@dataclass(frozen=True)
class Case:
    """A model with inputs and expected outputs."""

    model: onnx.ModelProto
    data: Sequence[tuple[Sequence[Any], Sequence[Any]]]
    rtol: float = 1e-3
    atol: float = 1e-6


def cases() -> dict[str, Callable[[], Case]]:
    """List the tests by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [*node.collect_testcases(None), *simple.collect_testcases()]
    listed: dict[str, Callable[[], Case]] = {
        f"{test.kind}/{test.name}": partial(
            Case, test.model, test.data_sets, test.rtol, max(test.atol, 1e-6)
        )
        for test in found
        if test.model is not None and test.data_sets
    }
    return listed | {f"light/{name}": partial(light, name) for name in zoo.LIGHT_MODELS}


def light(name: str) -> Case:
    """Make a light model, and run it with ONNX Runtime."""
    import onnxruntime

    model = zoo.light_model(name)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    given = session.get_inputs()[0]
    x = np.random.default_rng(0).standard_normal(given.shape).astype(np.float32)
    outputs = session.run(None, {given.name: x})
    return Case(model, [([x], outputs)], 1e-3, 1e-4 * float(np.abs(outputs[0]).max()))


def run_tvm(model: onnx.ModelProto, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Compile with TVM's own importer and pipeline, and run."""
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    target = tvm.target.Target({"kind": "llvm"})
    module = from_onnx(model, keep_params_in_input=False)
    pipeline = relax.get_default_pipeline(target)
    machine = relax.VirtualMachine(tvm.compile(module, target, relax_pipeline=pipeline), tvm.cpu())
    return _arrays(machine["main"](*[tvm.runtime.tensor(array) for array in inputs]))


def _arrays(result: Any) -> list[np.ndarray]:
    if hasattr(result, "numpy"):
        return [result.numpy()]
    return [array for item in result for array in _arrays(item)]


def run_tvm_sparse(model: onnx.ModelProto, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Compile with this package, and run."""
    import tvm_sparse as ts

    module = ts.compile(model, check=False, threads=1)
    outputs = module(*inputs)
    return outputs if isinstance(outputs, list) else [outputs]


RUNNERS: dict[str, Callable[..., list[np.ndarray]]] = {
    "tvm": run_tvm,
    "tvm_sparse": run_tvm_sparse,
}


def outcome(system: str, make: Callable[[], Case]) -> str:
    """Run one test; "ok", or what went wrong in one line."""
    try:
        case = make()
        for inputs, wanted in case.data:
            if not all(isinstance(x, np.ndarray) for x in [*inputs, *wanted]):
                return "sequences and optional values are no tensors"
            got = RUNNERS[system](case.model, inputs)
            for ours, theirs in zip(got, wanted, strict=True):
                if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
                    return f"{ours.dtype}{ours.shape} for {theirs.dtype}{theirs.shape}"
                np.testing.assert_allclose(
                    ours.astype(np.float64) if ours.dtype.kind == "f" else ours,
                    theirs.astype(np.float64) if theirs.dtype.kind == "f" else theirs,
                    rtol=case.rtol,
                    atol=case.atol,
                )
    except AssertionError:
        return "wrong numbers"
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[-1][:200]}"
    return "ok"


def child(first: int, names: Path) -> None:
    """Run tests from number `first` on; a line when one begins, a line for each outcome."""
    warnings.simplefilter("ignore")
    known = cases()
    for number, name in enumerate(names.read_text().splitlines()):
        if number < first:
            continue
        for system in SYSTEMS:
            print(json.dumps([number, name, system, None]), flush=True)
            # Ends the process where a test does not.
            signal.alarm(_PATIENCE)
            print(json.dumps([number, name, system, outcome(system, known[name])]), flush=True)


def run_all(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Run tests in children; one that ends takes the test it was at along."""
    results: dict[str, dict[str, str]] = {name: {} for name in names}
    with tempfile.TemporaryDirectory(prefix="onnx-suite-") as folder:
        listed = Path(folder) / "names"
        listed.write_text("\n".join(names))
        first = 0
        while first < len(names):
            at = first
            for number, name, system, found in _lines(first, listed):
                at = number
                results[name][system] = found or "the process ended"
                if found and system == SYSTEMS[-1] and number % 50 == 0:
                    print(f"{number} of {len(names)}", file=sys.stderr, flush=True)
            if at == len(names) - 1 and SYSTEMS[-1] in results[names[at]]:
                break
            # A crash of plain TVM must not take our own result along.
            if SYSTEMS[-1] not in results[names[at]]:
                results[names[at]][SYSTEMS[-1]] = _alone(names[at])
            first = at + 1
    return results


def _alone(name: str) -> str:
    code = (
        "import onnx_suite; "
        f"print(onnx_suite.outcome({SYSTEMS[-1]!r}, onnx_suite.cases()[{name!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
    )
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines and done.returncode == 0 else "the process ended"


def _lines(first: int, names: Path) -> Iterator[tuple[int, str, str, str | None]]:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(first), str(names)]
    environment = {**os.environ, "TVM_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=Path(__file__).parent,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("["):
                number, name, system, found = json.loads(line)
                yield number, name, system, found
    finally:
        process.kill()
        process.wait()


def summary(results: dict[str, dict[str, str]]) -> str:
    """Count what passes, and list what plain TVM passes and we do not."""
    passed = Counter(s for found in results.values() for s in SYSTEMS if found[s] == "ok")
    lost = [n for n, f in results.items() if f["tvm"] == "ok" and f["tvm_sparse"] != "ok"]
    won = sum(f["tvm"] != "ok" and f["tvm_sparse"] == "ok" for f in results.values())
    lines = [
        f"Of the {len(results)} tests that onnx {onnx.__version__} brings along, plain TVM passes "
        f"{passed['tvm']}, this compiler {passed['tvm_sparse']}: {won} more that plain TVM does "
        f"not, and {len(lost)} that it does are lost{':' if lost else '.'}"
    ]
    lines += [f"- `{name}`: {results[name]['tvm_sparse']}" for name in lost]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="tests whose name holds this; nothing is written")
    parser.add_argument("--child", nargs=2, metavar=("FIRST", "NAMES"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        child(int(options.child[0]), Path(options.child[1]))
        return 0
    names = [name for name in cases() if not options.only or options.only in name]
    results = run_all(names)
    text = summary(results)
    print(text)
    if not options.only:
        write_text(RESULTS, json.dumps(results, indent=0) + "\n")
        rewrite_page(PAGE, text, (BEGIN, END))
    return 0


if __name__ == "__main__":
    sys.exit(main())
