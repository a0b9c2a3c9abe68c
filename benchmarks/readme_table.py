"""Measure the table of the README: whole networks and one layer, at several sparsities.

    python benchmarks/readme_table.py             # all cases, one thread; writes and rewrites
    python benchmarks/readme_table.py --quick     # a smoke test on tiny networks; README untouched

Weights are pruned layer by layer, by magnitude. Everything with a weight is pruned but the first
convolution and depthwise convolutions. Every case runs in a process of its own. A run that was
stopped goes on where it was: a case that the result file holds, measured on the same processor with
the same versions and threads, is not measured again unless --again is given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx

from tvm_sparse import zoo
from tvm_sparse.bench import DEFAULT_PEERS, BenchCase, BenchResult, bench
from tvm_sparse.errors import SparseError
from tvm_sparse.files import write_text
from tvm_sparse.progress import Progress
from tvm_sparse.pruning import prunable_layers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "readme.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


@dataclass(frozen=True)
class Network:
    """A row group of the table: a network, and the shares of zeros to measure it at."""

    title: str
    build: Callable[[], onnx.ModelProto]
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95)


NETWORKS: tuple[Network, ...] = (
    Network("BERT-base encoder, 128 tokens", zoo.bert_encoder),
    Network("ResNet-50", partial(zoo.light_model, "resnet50")),
    Network("MobileNetV1", zoo.mobilenet_v1),
    Network("layer 768x768, 128 tokens", partial(zoo.single_matmul, 768, 768, 128), (0.9,)),
)

QUICK: tuple[Network, ...] = (
    Network(
        "tiny encoder",
        partial(zoo.bert_encoder, layers=1, hidden=64, heads=2, ffn=128, seq=16),
        (0.9,),
    ),
    Network("layer 96x96", partial(zoo.single_matmul, 96, 96, 32), (0.8, 0.9)),
)


def unpruned(model: onnx.ModelProto) -> list[str]:
    """Name the layers that stay as they are: the first convolution and all depthwise ones."""
    layers = prunable_layers(model)
    convolutions = [layer.name for layer in layers if layer.op == "Conv"]
    return convolutions[:1] + [layer.name for layer in layers if layer.is_depthwise]


def same_run(old: BenchResult | None, new: BenchResult) -> bool:
    """Whether results may stand in one file: measured on one machine with the same versions."""
    return old is not None and (old.cpu, old.system, old.versions) == (
        new.cpu,
        new.system,
        new.versions,
    )


def read_results(path: Path) -> BenchResult | None:
    """Return what was measured before, None when there is nothing that can be read."""
    try:
        return BenchResult.from_json(path.read_text())
    except (OSError, SparseError):
        return None


def rewritten(text: str, table: str) -> str:
    """Put the table between the two marks.

    Raises
    ------
    SparseError
        When a mark is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SparseError(f"the README lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def cases(networks: Sequence[Network]) -> Iterator[tuple[Network, float, str]]:
    """Every case with the name that it has in the results."""
    for network in networks:
        for share in network.sparsities:
            yield network, share, f"{network.title} @ {share:.0%}"


def known(old: BenchResult | None, name: str, threads: int) -> BenchCase | None:
    """Return a case that was measured before and has a time."""
    for case in old.cases if old else ():
        if (case.name, case.threads) == (name, threads) and case.median_ms("tvm_sparse"):
            return case
    return None


def measure(
    networks: Sequence[Network],
    path: Path,
    threads: int,
    *,
    again: bool = False,
    seconds: float = 20.0,
    repeats: int | None = None,
    against: Sequence[str] = DEFAULT_PEERS,
) -> BenchResult:
    """Measure what the file does not hold yet, and write the file after every case."""
    old = None if again else read_results(path)
    done: list[BenchCase] = []
    result: BenchResult | None = None
    for network, share, name in cases(networks):
        found = known(old, name, threads)
        if found is not None:
            done.append(found)
            continue
        model = network.build()
        fresh = bench(
            model,
            against,
            threads,
            name=name,
            sparsities=[share],
            skip=unpruned(model),
            seconds=seconds,
            repeats=repeats,
            progress=Progress(),
        )
        print(fresh, end="\n\n", flush=True)
        if old is not None and not same_run(old, fresh):
            print("the machine or a version has changed: everything is measured again")
            return measure(
                networks,
                path,
                threads,
                again=True,
                seconds=seconds,
                repeats=repeats,
                against=against,
            )
        done.extend(fresh.cases)
        result = replace(fresh, cases=tuple(done))
        result.to_json(path)
    if result is None:
        assert old is not None
        result = replace(old, cases=tuple(done))
    result = replace(result, cases=tuple(done))
    result.to_json(path)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny networks, three rounds")
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="rounds of one case")
    parser.add_argument("--results", type=Path, help="the file of results")
    parser.add_argument("--readme", type=Path, help="the file to rewrite")
    options = parser.parse_args(argv)
    networks = QUICK if options.quick else NETWORKS
    path = options.results or (RESULTS.with_name("quick.json") if options.quick else RESULTS)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = measure(
            networks,
            path,
            options.threads,
            again=options.again or options.quick,
            seconds=options.seconds,
            repeats=3 if options.quick else None,
        )
        print(result)
        readme = options.readme or (None if options.quick else README)
        if readme:
            write_text(readme, rewritten(readme.read_text(), result.markdown()))
    except SparseError as error:
        print(f"readme_table: {error}", file=sys.stderr)
        return 1
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
