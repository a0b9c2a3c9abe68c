"""Call one module from many threads, and serve it under attack: answers stay right, memory flat.

    python benchmarks/soak.py            # both: minutes; rewrites tables of the documentation
    python benchmarks/soak.py threads --calls 100000 --callers 8
    python benchmarks/soak.py serve --requests 20000 --attacks 5000

The model is a pruned multilayer perceptron with a free number of rows. Every answer is compared bit
for bit with that of the same input alone. What is counted is answers and memory, not speed, so the
machine need not be quiet. Writes benchmarks/results/soak.json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from attack import ATTACKS, Served, Target, binary_outputs, run_attack

import tvm_sparse as ts
from tvm_sparse.cpu_features import machine_identity
from tvm_sparse.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "soak.json"
PAGES = {
    "threads": (ROOT / "docs" / "threads.md", ("<!-- soak:begin -->", "<!-- soak:end -->")),
    "serve": (ROOT / "docs" / "serving.md", ("<!-- soak:begin -->", "<!-- soak:end -->")),
}

WIDTH = 256
# More sizes than TVM's memory is kept for, so that it is also given back in between.
LARGEST_BATCH = 96
CASES = 192
SAMPLES = 50

LIMITS = ("--max-queue", "64", "--max-request-bytes", "1000000", "--timeout", "10")


def model() -> onnx.ModelProto:
    """Three layers with 80 % zeros, for any number of rows."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    value = "x"
    for number in range(3):
        weight = rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 8
        weight[rng.random(weight.shape) < 0.8] = 0
        weights.append(onnx.numpy_helper.from_array(weight, f"w{number}"))
        nodes.append(onnx.helper.make_node("MatMul", [value, f"w{number}"], [f"h{number}"]))
        value = "y" if number == 2 else f"r{number}"
        nodes.append(onnx.helper.make_node("Relu", [f"h{number}"], [value]))
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", WIDTH])
        for name in ("x", "y")
    ]
    graph = onnx.helper.make_graph(nodes, "mlp", ends[:1], ends[1:], weights)
    opsets = [onnx.helper.make_opsetid("", 17)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)


def export(folder: Path) -> Path:
    """Compile the model to a library."""
    path = folder / "mlp.so"
    ts.compile(model(), threads=1).export(path)
    return path


def random_cases(module: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Make inputs of random sizes, with the answers that this thread alone gets."""
    rng = np.random.default_rng(1)
    cases = []
    for _ in range(CASES):
        rows = int(rng.integers(1, LARGEST_BATCH + 1))
        x = rng.standard_normal((rows, WIDTH)).astype(np.float32)
        cases.append((x, module(x).copy()))
    return cases


def resident_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) << 10


def work_off(tasks: int, workers: int, do: Callable[[int], None]) -> None:
    """Do numbered tasks in threads; the first failure is raised when all have ended."""
    numbers = iter(range(tasks))
    lock = threading.Lock()
    failures: list[BaseException] = []

    def work() -> None:
        while not failures:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                do(number)
            except BaseException as failure:  # raised below, in the caller's thread
                failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def soak_threads(
    library: Path, calls: int, callers: int, threads: int, instances: int | None = None
) -> dict[str, Any]:
    """Call a module from many threads; every answer and the memory are held against the first."""
    module = ts.load_module(library, threads=threads, instances=instances)
    cases = random_cases(module)
    chance = np.random.default_rng(2).integers(len(cases), size=calls)
    wrong: list[int] = []
    memory: list[int] = []

    def call(number: int) -> None:
        x, wanted = cases[chance[number]]
        if module(x).tobytes() != wanted.tobytes():
            wrong.append(number)
        if number % max(1, calls // SAMPLES) == 0:
            memory.append(resident_bytes())

    work_off(calls, callers, call)
    return {
        "calls": calls,
        "callers": callers,
        "threads": threads,
        "instances": module.instances,
        "wrong": len(wrong),
        **spread(memory),
    }


def spread(memory: Sequence[int]) -> dict[str, Any]:
    """Sum up samples of memory: from the first tenth on, when every caller has been there."""
    settled = memory[max(1, len(memory) // 10) :] or memory
    third = max(1, len(settled) // 3)
    return {
        "first_bytes": int(np.median(settled[:third])),
        "last_bytes": int(np.median(settled[-third:])),
        "largest_bytes": max(settled),
        "samples": list(memory),
    }


def soak_server(
    library: Path, requests: int, attacks: int, clients: int, *options: str
) -> dict[str, Any]:
    """Serve a module to right clients and to wrong ones at the same time."""
    module = ts.load_module(library, threads=1)
    cases = random_cases(module)
    statuses: Counter[int] = Counter()
    refused: Counter[int] = Counter()
    wrong: list[int] = []
    memory: list[int] = []
    lock = threading.Lock()
    names = list(ATTACKS)
    with Served(library, *LIMITS, *options) as server:
        target = Target(server.port, "/v2/models/mlp/infer", "x", WIDTH)

        def ask(number: int) -> None:
            x, wanted = cases[number % len(cases)]
            reply = target.ask(x)
            status = 0 if reply is None else reply.status
            with lock:
                statuses[status] += 1
            if reply is not None and status == 200 and binary_outputs(reply) != [wanted.tobytes()]:
                wrong.append(number)

        def attack(number: int) -> None:
            status = run_attack(names[number % len(names)], target, random.Random(number))
            with lock:
                refused[status] += 1

        def task(number: int) -> None:
            if number % max(1, (requests + attacks) // SAMPLES) == 0:
                memory.append(server.resident_bytes)
            # Spread among each other, as evenly as whole numbers go.
            before, now = (n * attacks // (requests + attacks) for n in (number, number + 1))
            if now > before:
                attack(before)
            else:
                ask(number - before)

        work_off(requests + attacks, clients, task)
        burst: Counter[int] = Counter()
        x, _ = cases[0]

        def rush(_number: int) -> None:
            reply = target.ask(x)
            with lock:
                burst[0 if reply is None else reply.status] += 1

        work_off(1000, 1000, rush)
        after = target.ask(x)
        is_alive = after is not None and after.status == 200
        after_burst = server.resident_bytes
        code = server.stop()
        tracebacks = sum("Traceback" in line for line in server.lines)
    return {
        "options": [*LIMITS, *options],
        "requests": requests,
        "attacks": attacks,
        "kinds": len(names),
        "clients": clients,
        "statuses": by_status(statuses),
        "refused": by_status(refused),
        "burst": by_status(burst),
        "wrong": len(wrong),
        "answers_afterwards": is_alive,
        "exit_code": code,
        "tracebacks": tracebacks,
        "after_burst_bytes": after_burst,
        **spread(memory),
    }


def by_status(counts: Counter[int]) -> dict[str, int]:
    """Name statuses; 0 is a connection that was closed without an answer."""
    return {str(status) if status else "closed": counts[status] for status in sorted(counts)}


def threads_table(cases: Sequence[dict[str, Any]]) -> str:
    """Write what calls from threads gave, as Markdown."""
    lines = [
        "| callers | threads of a call | instances | calls | wrong | memory at first, MB | at the "
        "end, MB | at most, MB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in cases:
        numbers = [case[key] for key in ("callers", "threads", "instances", "calls", "wrong")]
        cells = [f"{number:,}" for number in numbers] + memory_cells(case)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def serve_table(cases: Sequence[dict[str, Any]]) -> str:
    """Write what a server has answered, as Markdown."""
    lines = [
        "| options | requests | answers | wrong | attacks | answers | 1,000 at once | memory at "
        "first, MB | at the end, MB | at most, MB | exit code |",
        "| --- | ---: | --- | ---: | ---: | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for case in cases:
        cells = [
            f"`{' '.join(case['options'])}`",
            f"{case['requests']:,}",
            counts(case["statuses"]),
            f"{case['wrong']:,}",
            f"{case['attacks']:,}",
            counts(case["refused"]),
            counts(case["burst"]),
            *memory_cells(case),
            str(case["exit_code"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_cells(case: dict[str, Any]) -> list[str]:
    return [f"{case[f'{when}_bytes'] / 1e6:.0f}" for when in ("first", "last", "largest")]


def counts(statuses: dict[str, int]) -> str:
    return ", ".join(f"{name}: {number:,}" for name, number in statuses.items())


def main(arguments: Sequence[str] | None = None) -> int:
    from networks import rewrite_page

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=("threads", "serve"))
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--attacks", type=int, default=5_000)
    options = parser.parse_args(arguments)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory(prefix="tvm-sparse-soak-") as folder:
        library = export(Path(folder))
        if options.what != "serve":
            results["threads"] = [
                soak_threads(library, options.calls, options.callers, 1),
                soak_threads(library, options.calls, options.callers, 1, options.callers),
                soak_threads(library, options.calls // 5, options.callers, 2),
            ]
        if options.what != "threads":
            numbers = (options.requests, options.attacks, options.callers)
            results["serve"] = [
                soak_server(library, *numbers),
                soak_server(library, *numbers, "--max-batch", "64"),
            ]
    results["machine"], results["tvm_sparse"] = machine_identity(), ts.__version__
    write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    for what, table in (("threads", threads_table), ("serve", serve_table)):
        if what in results:
            text = f"{table(results[what])}\n\n{results['machine']}."
            print(text)
            rewrite_page(PAGES[what][0], text, PAGES[what][1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
