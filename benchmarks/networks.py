"""Measure whole networks at several sparsities: the tables of the README and of docs/networks.md.

    python benchmarks/networks.py                 # what the result file lacks; writes both
    python benchmarks/networks.py --threads 1     # one thread only
    python benchmarks/networks.py --quick         # a smoke test on tiny networks; nothing is kept

Weights are pruned layer by layer, by magnitude. Everything with a weight is pruned but the first
convolution and depthwise convolutions; the row without zeros is the network as it is. Every case
runs in a process of its own. Each kind of processor has a result file. A run that was stopped goes
on where it was: a case that the file holds, measured with the same versions and threads, is not
measured again unless --again is given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import onnx

from tvm_sparse import prune, zoo
from tvm_sparse.bench import BenchCase, BenchResult, bench
from tvm_sparse.errors import SparseError
from tvm_sparse.files import write_text
from tvm_sparse.progress import Progress
from tvm_sparse.pruning import prunable_layers
from tvm_sparse.targets import resolve_target

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "networks.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
AGAINST = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Network:
    """A row group of the tables.

    Attributes
    ----------
    title : str
    build : callable
        Makes the ONNX model.
    sparsities : tuple of float
        Shares of zeros to measure it at; 0 is the model as it is.
    asked : mapping of float to float
        The speed-ups that were aimed at, over the better dense float32 library.
    in_readme : bool
    """

    title: str
    build: Callable[[], onnx.ModelProto]
    sparsities: tuple[float, ...] = (0.0, 0.8, 0.9, 0.95)
    asked: Mapping[float, float] = field(default_factory=dict)
    in_readme: bool = False


def _asked(*speedups: float) -> dict[float, float]:
    # Without zeros, at most 1.3 times as slow.
    return dict(zip((0.0, 0.8, 0.9, 0.95), (1 / 1.3, *speedups), strict=True))


NETWORKS: tuple[Network, ...] = (
    Network(
        "BERT-base encoder, 128 tokens", zoo.bert_encoder, asked=_asked(3.2, 5, 7), in_readme=True
    ),
    Network(
        "BERT-base encoder, 4 x 384 tokens",
        partial(zoo.bert_encoder, seq=384, batch=4),
        asked=_asked(3, 4.5, 6),
    ),
    Network(
        "BERT-base encoder, 16 tokens", partial(zoo.bert_encoder, seq=16), asked=_asked(2, 3.5, 5)
    ),
    Network(
        "ResNet-50",
        partial(zoo.light_model, "resnet50"),
        asked=_asked(2.2, 3.2, 4),
        in_readme=True,
    ),
    Network("MobileNetV1", zoo.mobilenet_v1, asked=_asked(1.9, 2.8, 3.3), in_readme=True),
    Network("MobileNetV2", zoo.mobilenet_v2, asked=_asked(1.4, 1.8, 2), in_readme=True),
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


def rewritten(text: str, table: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """Put tables between the two marks.

    Raises
    ------
    SparseError
        When a mark is missing.
    """
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise SparseError(f"the page lacks the marks {marks[0]} and {marks[1]}")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def rewrite_page(page: Path, table: str, marks: tuple[str, str]) -> None:
    """Put tables between the two marks of a file.

    Raises
    ------
    SparseError
        When a mark is missing.
    """
    write_text(page, rewritten(page.read_text(), table, marks))


def pruned(model: onnx.ModelProto, sparsity: float) -> onnx.ModelProto:
    """Prune a network as all measurements do: layer by layer, by magnitude."""
    return prune(model, sparsity=sparsity, scope="layer", skip=unpruned(model))


def verdict(met: bool) -> str:
    """Say whether something is as it was aimed at, in a column of equal width."""
    return "met   " if met else "MISSED"


def cases(networks: Sequence[Network]) -> Iterator[tuple[Network, float, str]]:
    """Every case with the name that it has in the results."""
    for network in networks:
        for share in network.sparsities:
            yield network, share, case_name(network, share)


def case_name(network: Network, share: float) -> str:
    """Name a network with a share of zeros."""
    return f"{network.title} @ {share:.0%}"


def known(old: BenchResult | None, name: str, threads: int) -> BenchCase | None:
    """Return a case that was measured before and has a time."""
    for case in old.cases if old else ():
        if (case.name, case.threads) == (name, threads) and case.median_ms("tvm_sparse"):
            return case
    return None


def measure(
    networks: Sequence[Network],
    path: Path,
    threads: Sequence[int],
    *,
    again: bool = False,
    seconds: float = 10.0,
    repeats: int | None = None,
) -> BenchResult:
    """Measure what the file does not hold yet, and write the file after every case."""
    old = None if again else read_results(path)
    result: BenchResult | None = None if old is None else replace(old, cases=())
    wanted = [(case, count) for count in threads for case in cases(networks)]
    done = list(old.cases) if old else []
    for (network, share, name), count in wanted:
        if known(old, name, count) is not None:
            continue
        fresh = _bench(network, share, name, count, seconds, repeats)
        print(fresh, end="\n\n", flush=True)
        if old is not None and not same_run(old, fresh):
            print("the machine or a version has changed: everything is measured again")
            return measure(networks, path, threads, again=True, seconds=seconds, repeats=repeats)
        names = [(case.name, case.threads) for case in fresh.cases]
        done = [case for case in done if (case.name, case.threads) not in names]
        done.extend(fresh.cases)
        result = replace(fresh, cases=tuple(done))
        result.to_json(path)
    assert result is not None
    return replace(result, cases=tuple(done))


def _bench(
    network: Network,
    share: float,
    name: str,
    threads: int,
    seconds: float,
    repeats: int | None,
) -> BenchResult:
    model = network.build()
    return bench(
        model,
        AGAINST,
        threads,
        name=name,
        sparsities=[share] if share else None,
        skip=unpruned(model) if share else (),
        seconds=seconds,
        repeats=repeats,
        progress=Progress(),
    )


def selected(result: BenchResult, networks: Sequence[Network], threads: int) -> BenchResult:
    """Keep the cases of some networks at a number of threads, in the networks' order."""
    found = [known(result, name, threads) for _, _, name in cases(networks)]
    return replace(result, cases=tuple(case for case in found if case is not None))


def page(result: BenchResult, networks: Sequence[Network]) -> str:
    """Write the tables of one processor: what was measured, and what was aimed at."""
    parts = []
    for threads in sorted({case.threads for case in result.cases}):
        some = selected(result, networks, threads)
        parts += [f"#### {threads} thread{'s' if threads > 1 else ''}", some.markdown()]
        for network in networks:
            lines = [*_against_what_was_asked(network, result, threads)]
            parts += ["```\n" + "\n".join(lines) + "\n```"] if lines else []
    return "\n\n".join(parts)


def pages() -> Iterator[str]:
    """Write the tables of every processor that was measured, the newest run first."""
    found = [read_results(path) for path in RESULTS.glob("networks-*.json")]
    for result in sorted(filter(None, found), key=lambda result: result.date, reverse=True):
        yield f"### {result.cpu}"
        yield page(result, NETWORKS)


def _against_what_was_asked(network: Network, result: BenchResult, threads: int) -> Iterator[str]:
    for share, wanted in network.asked.items():
        case = known(result, case_name(network, share), threads)
        if case is not None and case.speedup:
            word = verdict(case.speedup >= wanted)
            yield f"{word}  {case.name}: {case.speedup:.2f}x (aimed at {wanted:.2f}x)"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny networks, three rounds")
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10.0, help="rounds of one case")
    parser.add_argument("--only", help="networks whose title holds this; the pages stay")
    parser.add_argument("--results", type=Path, help="the file of results")
    options = parser.parse_args(argv)
    networks = QUICK if options.quick else NETWORKS
    if options.only:
        networks = tuple(n for n in networks if options.only in n.title)
    kind = resolve_target("native").attrs["mcpu"]
    path = options.results or RESULTS / ("quick.json" if options.quick else f"networks-{kind}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = measure(
            networks,
            path,
            options.threads[:1] if options.quick else options.threads,
            again=options.again or options.quick,
            seconds=options.seconds,
            repeats=3 if options.quick else None,
        )
        print(result)
        if not options.quick and not options.only:
            readme = selected(result, [n for n in NETWORKS if n.in_readme], 1)
            rewrite_page(README, readme.markdown(), (BEGIN, END))
            rewrite_page(PAGE, "\n\n".join(pages()), (BEGIN, END))
    except SparseError as error:
        print(f"networks: {error}", file=sys.stderr)
        return 1
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
