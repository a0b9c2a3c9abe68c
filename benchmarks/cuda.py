"""Time sparse layers on a GPU, beside NVIDIA's libraries: built here, run there.

    python benchmarks/cuda.py build -o FOLDER [--target cuda-sm90a] [--case PATTERN] [--configs N]
    python benchmarks/cuda.py build -o FOLDER --smtx FILE [--tokens N]
    python benchmarks/cuda.py run FOLDER [--peers cublas,cusparse] [--json FILE] [--asked]
    python benchmarks/cuda.py list

`build` needs nvcc and no GPU. It writes one library a layer, with a `cases.json`. `run` needs a GPU
and no compiler: NumPy, TVM's runtime, and PyTorch (or CuPy) for the peers. With `--configs N`, the
N configurations of lowest estimate are built beside the plan's choice, and the fastest one counts.

Every result is held against float64 before it is timed. A call is timed by events around many
calls in a row, each on buffers of its own, which together are larger than the cache; ours and the
peers' in turn. Nothing is subtracted: a call includes what launching it costs where that is more
than the work.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from pathlib import Path

# This file is called as a package of NVIDIA's is, which would not be found behind it.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.append(sys.path.pop(0))

from cuda_cases import file_cases, matching

from tvm_sparse.errors import SparseError


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="compile the layers; needs nvcc")
    build.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    build.add_argument("--target", default="cuda-sm90a")
    build.add_argument("--case", action="append", metavar="PATTERN", help="may be repeated")
    build.add_argument("--configs", type=int, default=0, metavar="N")
    build.add_argument(
        "--no-weights",
        action="store_true",
        help="leave weights out; the run draws them again from their seeds",
    )
    build.add_argument(
        "--smtx",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="matrices of DLMC instead of our layers; may be repeated",
    )
    build.add_argument("--tokens", type=int, default=128, help="with --smtx; default: 128")
    run = commands.add_parser("run", help="time them; needs a GPU")
    run.add_argument("folder", type=Path)
    run.add_argument("--peers", default="cublas,cusparse,cusparselt,cudnn")
    run.add_argument("--json", type=Path, metavar="FILE")
    run.add_argument("--case", action="append", metavar="PATTERN")
    run.add_argument("--asked", action="store_true", help="compare with what was asked for")
    listed = commands.add_parser("list", help="name the layers")
    listed.add_argument("--case", action="append", metavar="PATTERN")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parsed(arguments)
    chosen = [case for pattern in options.case or [None] for case in matching(pattern)]
    cases = list(dict.fromkeys(chosen))
    try:
        if options.command == "list":
            print("\n".join(f"{case.name}  {case.dtype} {case.format}" for case in cases))
            return 0
        if options.command == "build":
            files = [case for path in options.smtx for case in file_cases(path, options.tokens)]
            return _build(options, files or cases)
        return _run(options)
    except SparseError as error:
        print(f"cuda.py: {error}", file=sys.stderr)
        return 1


def _build(options: argparse.Namespace, cases: list) -> int:
    if not cases:
        raise SparseError(f"no layer is called {', '.join(options.case)}; 'list' names them")
    from cuda_build import build

    found = build(
        options.output, cases, options.target, options.configs, weights=not options.no_weights
    )
    size = sum(file.stat().st_size for file in options.output.iterdir())
    print(
        f"{len(found['cases'])} layers in '{options.output}', {size / 2**20:.0f} MiB; "
        f"{len(found['skipped'])} skipped"
    )
    return 0 if found["cases"] else 1


def _run(options: argparse.Namespace) -> int:
    from cuda_peers import PEERS
    from cuda_run import run

    peers = [peer for peer in options.peers.split(",") if peer and peer != "none"]
    unknown = [peer for peer in peers if peer not in PEERS]
    if unknown:
        raise SparseError(f"no peer is called {', '.join(unknown)}; there are {', '.join(PEERS)}")

    def wanted(name: str) -> bool:
        patterns = options.case or [""]
        return any(fnmatch.fnmatchcase(name, p) or name.startswith(p) for p in patterns)

    return run(options.folder, peers, options.json, pattern=wanted, asked=options.asked)


if __name__ == "__main__":
    sys.exit(main())
