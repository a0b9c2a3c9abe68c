"""Every form of sparsity on this processor: time over the best dense library, and bytes.

    python benchmarks/forms.py [--case TEXT] [--cpu N] [--seconds S]

One layer in float32 on one thread, pinned; the kernel that the plan picks, alone and between layers
that keep their activations in panels, and the fastest one of each sparse format, with weights of
the same form in rotation (so that loops differ, as in a network), interleaved with ONNX Runtime and
OpenVINO in float32; where channels were pruned also on the smaller dense layer. Results go to
`benchmarks/results/forms-<processor>.json`, the table to docs/forms.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from cases import MatmulCase
from cuda_cases import kept
from networks import rewrite_page
from ours import Choice, Shop, between_panels, layer_of
from peers import best_float32, dense_peers
from timing import System, hot, rotating
from truth import Truth
from tvm_sparse.schedules.lookup import DENSE_FORMATS, template_named

from tvm_sparse.files import write_text
from tvm_sparse.profile import profile_weight
from tvm_sparse.targets import resolve_target

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "forms.md"
LAYER, FEW = MatmulCase(768, 768, 128), MatmulCase(2048, 2048, 1)
# What the page has between which marks.
TABLES = {
    LAYER: ("<!-- forms:begin -->", "<!-- forms:end -->"),
    FEW: ("<!-- few:begin -->", "<!-- few:end -->"),
}
COPIES = 8

# Forms, as `cuda_cases.kept` names them, and shares of zeros; N:M has its own. Of "channel", whole
# outputs go, and of "inputs" whole inputs. "+5%" gives so many more nonzeros back, the largest of
# what was cut: almost that form.
FORMS: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("unstructured", (0.5, 0.75, 0.9, 0.95)),
    ("2:4", (0.5,)),
    ("4:8", (0.5,)),
    ("1:4", (0.75,)),
    ("block:4x1", (0.75, 0.9, 0.95)),
    ("block:8x1", (0.75, 0.9, 0.95)),
    ("block:16x1", (0.75, 0.9, 0.95)),
    ("block:16x1+5%", (0.75, 0.9)),
    ("block:1x16", (0.75, 0.9, 0.95)),
    ("block:32x32", (0.75, 0.9, 0.95)),
    ("tile-wise:128", (0.75, 0.9)),
    ("tile-wise:128+5%", (0.75, 0.9)),
    ("64:2:8", (0.75,)),
    ("channel", (0.5, 0.75)),
    ("inputs", (0.5, 0.75)),
)


# The same of one token, where a layer reads its weight once and does little else.
FORMS_OF_FEW: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("unstructured", (0.5, 0.75, 0.9, 0.95)),
    ("2:4", (0.5,)),
    ("4:8", (0.5,)),
    ("1:4", (0.75,)),
    ("block:16x1", (0.75, 0.9)),
    ("channel", (0.5,)),
    ("inputs", (0.5,)),
)


@dataclass(frozen=True)
class Form:
    """A form at a share of zeros, of a layer."""

    form: str
    zeros: float
    layer: MatmulCase = LAYER

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.form}, {100 * self.zeros:g} %"

    @property
    def key(self) -> str:
        """What the results call it."""
        return f"{self.layer.name} {self.name}"

    def weight(self, seed: int) -> np.ndarray:
        """Draw a pruned weight [outputs, inputs], its magnitudes uneven as trained ones are."""
        rng = np.random.default_rng(seed)
        shape = (self.layer.m, self.layer.k)
        scales = [np.exp(0.4 * rng.standard_normal(size)) for size in shape]
        weight = rng.standard_normal(shape) * scales[0][:, None] * scales[1]
        weight = weight.astype(np.float32)
        if self.form in ("channel", "inputs"):
            axis = 0 if self.form == "channel" else 1
            norms = np.square(weight).sum(axis=1 - axis)
            gone = np.argsort(norms)[: round(self.zeros * len(norms))]
            weight[(gone, slice(None)) if axis == 0 else (slice(None), gone)] = 0
            return weight
        form, _, more = self.form.partition("+")
        stays = kept(np.abs(weight), form, self.zeros)
        if more:
            rest = np.where(stays, 0, np.abs(weight)).reshape(-1)
            count = round(float(more.rstrip("%")) / 100 * stays.sum())
            stays.reshape(-1)[np.argpartition(rest, -count)[-count:]] = True
        return weight * stays

    @property
    def smaller(self) -> MatmulCase | None:
        """The dense layer that is left where channels were pruned."""
        left = 1 - self.zeros
        if self.form == "channel":
            return replace(self.layer, m=round(left * self.layer.m))
        if self.form == "inputs":
            return replace(self.layer, k=round(left * self.layer.k))
        return None


def measure(shop: Shop, form: Form, seconds: float) -> dict[str, Any]:
    """Time one form; check every kernel first."""
    case, x = form.layer, form.layer.input()
    layers = [layer_of(case, form.weight(seed), x) for seed in range(COPIES)]
    truths = [Truth(case, layer.weight, x) for layer in layers]
    planned = shop.planned(layers[0])
    choices = {"plan": planned, **_best_by_format(shop, layers[0], truths[0])}
    systems: dict[str, System] = {}
    packed: dict[str, int] = {}
    for name, choice in choices.items():
        kernels = [shop.build(layer, choice) for layer in layers]
        for kernel, truth in zip(kernels, truths, strict=True):
            kernel.call()
            truth.check(f"{form.key}: {choice}", kernel.output())
        systems[name] = System([k.call for k in kernels], kernels[0].nothing)
        packed[name] = kernels[0].packed_bytes
    if case.n > 1:
        between = [between_panels(layer) for layer in layers]
        choices["panels"] = shop.planned(between[0])
        kernels = [shop.build(layer, choices["panels"]) for layer in between]
        systems["panels"] = System([k.call for k in kernels], kernels[0].nothing)
    systems |= _dense_systems(case, x, "dense")
    if form.smaller is not None:
        systems |= _dense_systems(form.smaller, form.smaller.input(), "smaller")
    times = {name: spread.median for name, spread in rotating(systems, seconds).items()}
    return {
        "key": form.key,
        "name": form.name,
        "pattern": profile_weight(layers[0].weight).pattern,
        "us": times,
        "dense_us": _best(times, "dense"),
        "smaller_us": _best(times, "smaller"),
        "kernels": {name: str(choice) for name, choice in choices.items()},
        "packed_bytes": packed,
        "dense_bytes": layers[0].weight.nbytes,
    }


def _dense_systems(case: MatmulCase, x: np.ndarray, prefix: str) -> dict[str, System]:
    """Prepare the dense libraries, with weights in rotation like ours."""
    rng = np.random.default_rng(0)
    shape = (case.m, case.k)
    weights = [rng.standard_normal(shape).astype(np.float32) for _ in range(COPIES)]
    copies = [dense_peers(case, weight, x, 1, only_float32=True) for weight in weights]
    return {
        f"{prefix} {name}": System([peers[name].call for peers in copies], copies[0][name].nothing)
        for name in copies[0]
    }


def _best(times: dict[str, float], prefix: str) -> float | None:
    found = {k.removeprefix(f"{prefix} "): v for k, v in times.items() if k.startswith(prefix)}
    return best_float32(found) if found else None


def _best_by_format(shop: Shop, layer: Any, truth: Truth) -> dict[str, Choice]:
    """Find the fastest configuration of every sparse format."""
    best: dict[str, tuple[float, Choice]] = {}
    for choice in shop.choices(layer):
        weight_format = template_named(choice.template).format
        if weight_format in DENSE_FORMATS:
            continue
        kernel = shop.build(layer, choice)
        kernel.call()
        truth.check(str(choice), kernel.output())
        us = hot({"kernel": System([kernel.call], kernel.nothing)}, 0.05)["kernel"].median
        if weight_format not in best or us < best[weight_format][0]:
            best[weight_format] = (us, choice)
    return {name: choice for name, (_, choice) in best.items()}


def table(cases: list[dict[str, Any]]) -> str:
    """Write times over dense of the plan and of every format, and bytes over dense."""
    formats = [name for name in cases[0]["kernels"] if name not in ("plan", "panels")]
    timed = [name for name in ("plan", "panels") if name in cases[0]["us"]] + formats
    titles = {"plan": "plan", "panels": "in panels"} | {name: f"`{name}`" for name in formats}
    ratios = [titles[name] for name in timed]
    heads = ["form, zeros", "found as", "plan picks", *ratios, "bytes", "smaller dense"]
    lines = [
        f"| {' | '.join(heads)} |",
        f"| --- | --- | --- |{' ---: |' * (len(heads) - 3)}",
    ]
    for case in cases:
        faster = [f"{case['dense_us'] / case['us'][name]:.1f}x" for name in timed]
        share = case["packed_bytes"]["plan"] / case["dense_bytes"]
        picked = f"`{case['kernels']['plan'].split()[0]}`"
        smaller = case["smaller_us"]
        beside = f"{case['us']['plan'] / smaller:.2f}" if smaller else ""
        cells = [case["name"], case["pattern"], picked, *faster, f"{share:.2f}", beside]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="", help="only what has this text in shape and form")
    parser.add_argument("--cpu", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.cpu})
    mcpu = str(resolve_target("native").attrs["mcpu"])
    path = ROOT / "benchmarks" / "results" / f"forms-{mcpu}.json"
    results = {case["key"]: case for case in json.loads(path.read_text())} if path.exists() else {}
    # One for all: what kernels are compiled to does not depend on where the nonzeros are.
    shop = Shop("native", 1)
    for form in all_forms():
        if options.case in form.key:
            results[form.key] = measure(shop, form, options.seconds)
            write_text(path, json.dumps(list(results.values()), indent=1) + "\n")
            print(table([results[form.key]]).splitlines()[-1], flush=True)
    for layer, marks in TABLES.items():
        cases = [results[f.key] for f in all_forms() if f.layer == layer and f.key in results]
        if cases:
            rewrite_page(PAGE, table(cases), marks)
    return 0


def all_forms() -> list[Form]:
    """List what the tables have."""
    both = ((LAYER, FORMS), (FEW, FORMS_OF_FEW))
    return [
        Form(form, zeros, layer)
        for layer, forms in both
        for form, shares in forms
        for zeros in shares
    ]


if __name__ == "__main__":
    sys.exit(main())
