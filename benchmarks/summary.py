"""Tables and verdicts from the JSON of `kernels.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from smtx import FILE_GROUP

FLOAT32_PEERS = ("onnxruntime", "openvino f32")
CSR = ("mkl csr", "scipy csr")


@dataclass(frozen=True)
class Row:
    """One case at one density, with the ratios that the tables and targets speak of."""

    section: str
    name: str
    group: str
    data: dict[str, Any]
    peers: dict[str, Any]

    @property
    def density(self) -> float:
        """Share of nonzeros asked for."""
        return self.data["density"]

    def us(self, system: str, kind: str = "hot") -> float | None:
        """Return a median in microseconds, None when there is none."""
        times = self.data["systems"].get(system) or self.peers.get(system) or {}
        return times[kind]["median"] if kind in times else None

    def fastest(self, systems: Sequence[str], kind: str = "hot") -> float | None:
        """Return the fastest median of several systems."""
        times = [self.us(system, kind) for system in systems]
        return min((time for time in times if time is not None), default=None)

    def dense_us(self, kind: str = "hot") -> float | None:
        """Return the best float32 dense peer's time; under AVX2, of those that keep to it."""
        if self.section != "avx2":
            return self.fastest(FLOAT32_PEERS, kind)
        # OpenVINO lets its convolutions be kept to AVX2, and its products not.
        conv = "openvino f32" if "@" in self.name else "openblas"
        return self.fastest((conv, "dense"), kind)

    def over(self, reference: float | None, system: str, kind: str = "hot") -> float | None:
        """Return how many times faster than a reference a system is."""
        time = self.us(system, kind)
        return reference / time if reference and time else None

    def over_dense(self, system: str, kind: str = "hot") -> float | None:
        """Return the speed over the best dense float32 peer."""
        return self.over(self.dense_us(kind), system, kind)

    def over_bar(self, system: str, kind: str = "hot") -> float | None:
        """Return the speed over the hand-written bar."""
        return self.over(self.us("bar", kind), system, kind)

    def over_csr(self, system: str) -> float | None:
        """Return the speed over the better of the products of compressed rows."""
        return self.over(self.fastest(CSR), system)

    def over_one_thread(self, system: str) -> float | None:
        """Return the speed over the same kernels on one thread."""
        return self.over(self.us(f"{system} one thread"), system)

    def cold_over_hot(self, system: str) -> float | None:
        """Return how much longer a call with cold caches takes."""
        return self.over(self.us(system, "cold"), system)

    def cold_allowance(self, system: str, memory_gbytes: float) -> float | None:
        """Return the cold time over 1.5 times the hot one plus the packed bytes from memory."""
        warm, icy = self.us(system), self.us(system, "cold")
        fetch = self.data["floors"]["packed_bytes"] / memory_gbytes * 1e-3
        return icy / (1.5 * warm + fetch) if warm and icy else None


def rows(section: str, content: dict[str, Any]) -> list[Row]:
    """List a section's cases at their densities."""
    return [
        Row(section, case["name"], case["group"], entry, case["peers"])
        for case in content["cases"]
        for entry in case["densities"]
    ]


Value = Callable[[Row], float | str | None]


def _time(system: str, kind: str = "hot") -> Value:
    return lambda row: row.us(system, kind)


_FLOOR: tuple[tuple[str, Value], ...] = (
    ("floor", lambda r: r.data["floors"]["hot"]),
    ("binds", lambda r: r.data["floors"]["binds"]),
    ("unshared L1", lambda r: r.data["floors"]["l1"]),
)
_LAYER: tuple[tuple[str, Value], ...] = (
    ("plan", _time("plan")),
    ("best", _time("best")),
    ("rotating", _time("best", "rotating")),
    ("cold", _time("best", "cold")),
)
_ALONE: tuple[tuple[str, Value], ...] = (
    ("alone", _time("plan alone")),
    ("best alone", _time("best alone")),
    ("alone rotating", _time("best alone", "rotating")),
)
_PEERS: tuple[tuple[str, Value], ...] = (
    ("ORT", _time("onnxruntime")),
    ("OV f32", _time("openvino f32")),
    ("OV default", _time("openvino default")),
)
_CSR: tuple[tuple[str, Value], ...] = (("MKL", _time("mkl csr")), ("SciPy", _time("scipy csr")))
_BAR: tuple[tuple[str, Value], ...] = (
    ("bar", _time("bar")),
    ("bar rotating", _time("bar", "rotating")),
)
_DENSE: tuple[tuple[str, Value], ...] = (("our dense", _time("dense")),)
_BLAS: tuple[tuple[str, Value], ...] = (("BLAS", _time("openblas")),)
_X_DENSE: tuple[tuple[str, Value], ...] = (
    ("plan x dense", lambda r: r.over_dense("plan")),
    ("best x dense", lambda r: r.over_dense("best")),
)
_X_BAR: tuple[tuple[str, Value], ...] = (
    ("plan x bar", lambda r: r.over_bar("plan")),
    ("best x bar", lambda r: r.over_bar("best")),
)
_X_BAR_ALONE: tuple[tuple[str, Value], ...] = (
    ("alone x bar", lambda r: r.over_bar("plan alone")),
    ("best alone x bar", lambda r: r.over_bar("best alone")),
)
_X_CSR: tuple[tuple[str, Value], ...] = (("plan x CSR", lambda r: r.over_csr("plan")),)
_COLD: tuple[tuple[str, Value], ...] = (("cold/hot", lambda r: r.cold_over_hot("plan")),)

COLUMNS: dict[str, tuple[tuple[str, Value], ...]] = {
    "matmul": (
        *(*_FLOOR, *_BAR, *_ALONE, *_LAYER, *_DENSE, *_PEERS, *_CSR),
        *(*_X_BAR_ALONE, *_X_BAR, *_X_DENSE, *_X_CSR, *_COLD),
    ),
    "few": (*_FLOOR, *_BAR, *_LAYER, *_DENSE, *_PEERS, *_CSR, *_X_DENSE, *_X_CSR, *_COLD),
    "conv": (*_FLOOR, *_BAR, *_LAYER, *_DENSE, *_PEERS, *_X_BAR, *_X_DENSE, *_COLD),
    "threads": (
        ("one", _time("plan one thread")),
        ("two", _time("plan")),
        ("best one", _time("best one thread")),
        ("best two", _time("best")),
        *_PEERS,
        ("plan x one", lambda r: r.over_one_thread("plan")),
        ("best x one", lambda r: r.over_one_thread("best")),
        *_X_DENSE,
    ),
    "avx2": (
        *(*_FLOOR, *_BAR, *_ALONE, *_LAYER, *_DENSE, *_BLAS, *_PEERS, *_CSR),
        *(*_X_BAR_ALONE, *_X_BAR, *_X_DENSE, *_COLD),
    ),
}


@dataclass(frozen=True)
class Target:
    """What a mean or a worst case has to reach.

    Attributes
    ----------
    at_least : bool
        Else at most.
    worst : bool
        The worst row instead of the geometric mean.
    """

    text: str
    needed: float
    value: Value
    applies: Callable[[Row], bool] = lambda row: True
    worst: bool = False
    at_least: bool = True

    def reached(self, values: Sequence[float]) -> float:
        """Return the mean or the worst of the values."""
        if not self.worst:
            return geometric_mean(values)
        return min(values) if self.at_least else max(values)

    def line(self, table: Sequence[Row]) -> str:
        """Say in a line what was reached; empty when nothing was measured for it."""
        found = [self.value(row) for row in table if self.applies(row)]
        values = [value for value in found if isinstance(value, float) and value > 0]
        if not values:
            return ""
        reached = self.reached(values)
        met = reached >= self.needed if self.at_least else reached <= self.needed
        kind = "worst" if self.worst else "geometric mean"
        sign = ">=" if self.at_least else "<="
        return (
            f"{'met   ' if met else 'MISSED'}  {self.text}: {kind} {reached:.2f} of {len(values)} "
            f"(needs {sign} {self.needed:g})"
        )


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def _at(density: float) -> Callable[[Row], bool]:
    return lambda row: abs(row.density - density) < 1e-9


def _in(group: str, density: float) -> Callable[[Row], bool]:
    return lambda row: row.group.startswith(group) and _at(density)(row)


def _against_bar(system: str, title: str, mean: float, worst: float) -> Iterator[Target]:
    for kind in ("hot", "rotating"):

        def value(row: Row, kind: str = kind) -> float | None:
            return row.over_bar(system, kind)

        yield Target(f"{title} over the bar, {kind}", mean, value)
        if worst:
            yield Target(f"{title} over the bar, {kind}", worst, value, worst=True)


def _matmul_targets() -> Iterator[Target]:
    for pick in ("plan", "best"):
        yield from _against_bar(f"{pick} alone", f"kernel alone ({pick})", 1.0, 0.93)
        yield from _against_bar(pick, f"layer ({pick})", 0.87, 0)
        yield Target(
            f"kernel alone ({pick}) over the bar at 0.1 and 0.05",
            1.2,
            lambda row, pick=pick: row.over_bar(f"{pick} alone"),
            lambda row: _at(0.1)(row) or _at(0.05)(row),
        )
        for density, needed in {0.5: 1.8, 0.3: 2.6, 0.2: 3.6, 0.1: 6.0, 0.05: 10.0}.items():
            yield Target(
                f"BERT layers ({pick}) over dense at {density:g}",
                needed,
                lambda row, pick=pick: row.over_dense(pick),
                _in("bert", density),
                worst=True,
            )


def _few_targets() -> Iterator[Target]:
    for pick in ("plan", "best"):
        yield Target(
            f"1 to 15 tokens ({pick}) over CSR",
            1.0,
            lambda row, pick=pick: row.over_csr(pick),
            lambda row: int(row.name.split("x")[-1]) < 16,
            worst=True,
        )
        for tokens, needed in {16: 4.0, 32: 5.0}.items():
            yield Target(
                f"{tokens} tokens ({pick}) over dense at 0.1",
                needed,
                lambda row, pick=pick: row.over_dense(pick),
                lambda row, tokens=tokens: row.name.endswith(f"x{tokens}") and _at(0.1)(row),
                worst=True,
            )
    yield Target("plan over dense", 1.0, lambda row: row.over_dense("plan"), worst=True)


def _conv_targets() -> Iterator[Target]:
    for pick in ("plan", "best"):
        yield Target(f"over the bar ({pick})", 1.0, lambda row, pick=pick: row.over_bar(pick))
        for kernel in ("1x1", "3x3"):
            for density, needed in {0.2: 2.8, 0.1: 4.5, 0.05: 7.0}.items():
                yield Target(
                    f"{kernel} ({pick}) over dense at {density:g}",
                    needed,
                    lambda row, pick=pick: row.over_dense(pick),
                    lambda row, kernel=kernel, density=density: (
                        row.name.startswith(kernel) and _at(density)(row)
                    ),
                )


def _cold_target(memory_gbytes: float) -> Target:
    return Target(
        "cold over 1.5 hot plus packed bytes from memory, at 0.1",
        1.0,
        lambda row: row.cold_allowance("plan", memory_gbytes),
        _at(0.1),
        worst=True,
        at_least=False,
    )


def _targets(section: str, memory_gbytes: float) -> Iterator[Target]:
    if section == "matmul":
        yield from _matmul_targets()
    if section == "few":
        yield from _few_targets()
    if section == "conv":
        yield from _conv_targets()
    if section == "threads":
        for pick in ("plan", "best"):
            yield Target(
                f"two threads ({pick}) over one, layers above 200 us",
                1.85,
                lambda row, pick=pick: row.over_one_thread(pick),
                lambda row, pick=pick: (row.us(f"{pick} one thread") or 0) > 200,
                worst=True,
            )
        return
    if section == "avx2":
        for pick in ("plan", "best"):
            yield from _against_bar(f"{pick} alone", f"matmul alone ({pick})", 0.9, 0)
            yield from _against_bar(pick, f"layer ({pick})", 0.9, 0)
            yield Target(
                f"over the best dense AVX2 ({pick})",
                1.0,
                lambda row, pick=pick: row.over_dense(pick),
            )
    yield _cold_target(memory_gbytes)


def summarise(section: str, content: dict[str, Any]) -> str:
    """Return a section's table, its means by group and density, and how its targets fare."""
    found, environment = rows(section, content), content["environment"]
    columns = COLUMNS[section]
    head = ["case", "density", *(title for title, _ in columns)]
    body = [
        [row.name, f"{row.density:g}", *(_cell(value(row)) for _, value in columns)]
        for row in found
    ]
    lines = [f"== {section} ==", machine_line(environment), "", _table(head, body), ""]
    lines += [*_means(found), "", *target_lines(section, content)]
    return "\n".join([*lines, ""])


def target_lines(section: str, content: dict[str, Any]) -> Iterator[str]:
    """Say for every target of a section that something was measured for what was reached."""
    memory = content["environment"]["limits"]["memory_gbytes"]
    # What is asked of our shapes is not asked of matrices from files.
    found = [row for row in rows(section, content) if row.group != FILE_GROUP]
    yield from filter(None, (target.line(found) for target in _targets(section, memory)))


def _means(found: Sequence[Row]) -> Iterator[str]:
    groups = dict.fromkeys((row.group, row.density) for row in found)
    for group, density in groups:
        own = [row for row in found if (row.group, row.density) == (group, density)]
        ratios = [("dense", row.over_dense("plan")) for row in own]
        ratios += [("the bar", row.over_bar("plan")) for row in own]
        parts = []
        for against in ("dense", "the bar"):
            values = [value for name, value in ratios if name == against and value]
            if values:
                parts.append(
                    f"{geometric_mean(values):.2f}x {against} (worst {min(values):.2f}, "
                    f"{len(values)} cases)"
                )
        if parts:
            yield f"{group} at {density:g}: plan {', '.join(parts)}"


def machine_line(environment: dict[str, Any]) -> str:
    """Say what was measured how, on which processor, with which versions."""
    names = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    limits = environment["limits"]
    rates = ", ".join(
        f"{key.removesuffix('_gbytes')} {limits[key]:.0f}"
        for key in ("l1_gbytes", "l2_gbytes", "l3_gbytes", "memory_gbytes")
    )
    return (
        f"Microseconds a call (medians of interleaved rounds), {environment['threads']} thread(s) "
        f"on core {', '.join(map(str, environment['cores']))} of {environment['cpu']}, "
        f"{environment['date'][:10]}; {names}.\n"
        f"Limits of a core: {limits['fma_gflops']:.0f} GFLOP/s; reading in GB/s: {rates}."
    )


def _cell(value: float | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *body)
    )
