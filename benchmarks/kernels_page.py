"""Write the figures of `docs/kernels.md` from the JSON of `kernels.py`.

python benchmarks/kernels_page.py [--json FILE] [--page FILE.md]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from networks import rewrite_page
from results import Store
from summary import Row, machine_line, rows, target_lines

from tvm_sparse.errors import SparseError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kernels.json"
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"

# Section -> its heading, and the system whose figures are shown.
SECTIONS: dict[str, tuple[str, str]] = {
    "matmul": ("Matrix products, one thread", "plan"),
    "few": ("Few tokens, one thread", "plan"),
    "conv": ("Convolutions, one thread", "plan"),
    "threads": ("Two threads", "plan"),
    "avx2": ("AVX2, one thread", "plan"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    sections = Store(options.json).read()
    if not sections:
        parser.error(f"'{options.json}' holds no results")
    figures = "\n".join(
        line for name in SECTIONS if name in sections for line in part(name, sections)
    )
    try:
        rewrite_page(options.page, figures.rstrip("\n"), (BEGIN, END))
    except SparseError as error:
        parser.error(str(error))
    print(f"{options.page}: {', '.join(name for name in SECTIONS if name in sections)}")


def part(name: str, sections: dict[str, Any]) -> Iterator[str]:
    """Give the lines of one section: its machine, a table of cases by density, its targets."""
    title, system = SECTIONS[name]
    found = rows(name, sections[name])
    yield from (f"### {title}", "", machine_line(sections[name]["environment"]), "")
    yield from table(found, system)
    yield from ("", "```")
    yield from target_lines(name, sections[name])
    yield from ("```", "")


def table(found: Sequence[Row], system: str) -> Iterator[str]:
    """Give a Markdown table: microseconds of the planned kernel, and its speed over dense."""
    densities = list(dict.fromkeys(row.density for row in found))
    dense_of = {row.name: row.dense_us() for row in found}
    cells = {(row.name, row.density): cell(row, system) for row in found}
    yield " | ".join(["| layer", "dense", *(f"{1 - d:.0%} zeros" for d in densities)]) + " |"
    yield "| --- |" + " ---: |" * (1 + len(densities))
    for name, dense in dense_of.items():
        shown = [cells.get((name, density), "") for density in densities]
        yield " | ".join([f"| {name}", f"{dense:.0f}" if dense else "", *shown]) + " |"


def cell(row: Row, system: str) -> str:
    """Show a time in microseconds and the speed over the best dense float32 peer."""
    time, ratio = row.us(system), row.over_dense(system)
    if time is None:
        return ""
    digits = 1 if time < 10 else 0
    return f"{time:.{digits}f} ({ratio:.1f}x)" if ratio else f"{time:.{digits}f}"


if __name__ == "__main__":
    main()
