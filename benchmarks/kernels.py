"""Measure single kernels against a hand-written bar, sparse and dense peers, and the roofline.

    python benchmarks/kernels.py                          # every section, hours
    python benchmarks/kernels.py matmul conv --densities 0.2,0.1 --shapes 768x768,3x3
    python benchmarks/kernels.py --quick                  # everything once, on tiny shapes
    python benchmarks/kernels.py --show                   # the tables of an existing file
    python benchmarks/kernels.py --smtx FILE --tokens 128  # matrices of DLMC instead of ours

Sections: matmul, few (columns), conv, threads, avx2. Each runs in a process of its own, pinned to
one core (threads: two). Every output is checked against float64 before it is timed. Results are
kept case by case in a JSON file; a case that is measured again replaces the older one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from results import Store
from smtx import read_smtx
from summary import summarise

from tvm_sparse.errors import InputError

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "kernels.json"
# Of matrices from files, which the tables of docs/kernels.md know nothing of.
FILE_RESULTS = HERE / "results" / "smtx.json"
# Times of tiny shapes are no results.
QUICK_RESULTS = Path(tempfile.gettempdir()) / "kernels-quick.json"
THREADS: dict[str, int] = {"matmul": 1, "few": 1, "conv": 1, "threads": 2, "avx2": 1}
# Keeps libraries to AVX2 that choose their code by the processor and let themselves be told.
AVX2_ONLY = {"OPENBLAS_CORETYPE": "Haswell", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def main() -> int:
    options = _parser().parse_args()
    usual = FILE_RESULTS if options.smtx else RESULTS
    options.json = options.json or (QUICK_RESULTS if options.quick else usual)
    unknown = [name for name in options.sections if name not in THREADS]
    if unknown:
        print(f"there is no section '{unknown[0]}'; there are {', '.join(THREADS)}")
        return 2
    try:
        for path in options.smtx:
            read_smtx(path)
    except InputError as error:
        print(f"kernels.py: {error}", file=sys.stderr)
        return 1
    sections = options.sections or (["matmul"] if options.smtx else list(THREADS))
    if not options.show:
        for name in sections:
            code = measure(name, options)
            if code:
                return code
    found = Store(options.json).read()
    print("\n".join(summarise(name, found[name]) for name in sections if name in found))
    return 0


def measure(section: str, options: argparse.Namespace) -> int:
    """Run a section in a process of its own; return its exit code."""
    cores = pick_cores(sorted(os.sched_getaffinity(0)), options.cpu, THREADS[section])
    if not cores:
        print(f"{section}: left out, it needs {THREADS[section]} cores")
        return 0
    job = {
        "section": section,
        "cores": cores,
        "quick": options.quick,
        "densities": options.densities,
        "shapes": options.shapes,
        "seconds": options.seconds,
        "smtx": [str(path.resolve()) for path in options.smtx],
        "tokens": options.tokens,
        "json": str(options.json.resolve()),
    }
    with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        command = [sys.executable, str(HERE / "measure.py"), str(path)]
        return subprocess.run(command, env=_environment(section), cwd=folder).returncode


def pick_cores(available: list[int], first: int | None, count: int) -> list[int]:
    """Choose cores from `first` on; empty when there are too few."""
    start = available[0] if first is None else first
    others = [core for core in available if core != start]
    return [start, *others[: count - 1]] if len(others) + 1 >= count else []


def _environment(section: str) -> dict[str, str]:
    threads = str(THREADS[section])
    return {
        **os.environ,
        "TVM_NUM_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_THREADING_LAYER": "SEQUENTIAL",
        "MKL_INTERFACE_LAYER": "LP64",
        **(AVX2_ONLY if section == "avx2" else {}),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(THREADS))
    parser.add_argument("--densities", type=_numbers, help="comma-separated, for example 0.1,0.05")
    parser.add_argument("--shapes", type=_words, help="only cases whose name holds one of these")
    parser.add_argument(
        "--seconds", type=float, default=6, help="rounds of a case go on for this long"
    )
    parser.add_argument(
        "--smtx", type=Path, action="append", default=[], metavar="FILE", help="may be repeated"
    )
    parser.add_argument("--tokens", type=int, default=128, help="with --smtx; default: 128")
    parser.add_argument("--cpu", type=int, help="core to pin to; default: the first one allowed")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, a smoke test")
    parser.add_argument("--show", action="store_true", help="measure nothing, print the tables")
    parser.add_argument("--json", type=Path, help=f"default: {RESULTS}")
    return parser


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    sys.exit(main())
