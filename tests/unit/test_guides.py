"""The guides for those who extend this package: every block of code on their pages runs."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_formats
import test_spies
import tvm_sparse.schedules.lookup as lookup
import tvm_sparse.schedules.x86.templates as templates

import tvm_sparse.targets as targets
from tvm_sparse.formats import FORMATS
from tvm_sparse.ops import OPERATORS

DOCS = Path(__file__).resolve().parents[2] / "docs"
_ROWS = re.compile(r"# rows of (\w+), in (\S+)\n")


def blocks(page: str) -> Iterator[str]:
    """The Python blocks of a page, in their order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    yield from re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How rows are added to each table; afterwards the tables are what they were."""

    def add_to(table: dict[str, Any]) -> Any:
        def add(rows: dict[str, Any]) -> None:
            for name, value in rows.items():
                monkeypatch.setitem(table, name, value)

        return add

    def add_templates(rows: tuple[Any, ...]) -> None:
        monkeypatch.setattr(templates, "TEMPLATES", (*templates.TEMPLATES, *rows))
        monkeypatch.setattr(lookup, "X86_TEMPLATES", (*lookup.X86_TEMPLATES, *rows))
        monkeypatch.setattr(lookup, "ALL_TEMPLATES", (*lookup.ALL_TEMPLATES, *rows))

    def add_gpus(rows: tuple[Any, ...]) -> None:
        monkeypatch.setattr(targets, "_GPUS", (*targets._GPUS, *rows))

    return {
        "FORMATS": add_to(FORMATS),
        "CONFIGS": add_to(test_formats.CONFIGS),
        "OPERATORS": add_to(OPERATORS),
        "SHORT_NAMES": add_to(targets.SHORT_NAMES),
        "TEMPLATES": add_templates,
        "_GPUS": add_gpus,
        "modules": add_to(sys.modules),
    }


def follow(page: str, tables: dict[str, Any]) -> dict[str, Any]:
    """Run a page from its beginning to its end; rows go to the tables that they are for."""
    # A module of its own, where dataclasses look for what annotations name.
    module = ModuleType(f"guide_{page.removesuffix('.md')}")
    tables["modules"]({module.__name__: module})
    names = vars(module)
    for number, block in enumerate(blocks(page), 1):
        rows = _ROWS.match(block)
        if rows is None:
            exec(compile(block, f"{page}, block {number}", "exec"), names)
            continue
        table, place = rows.groups()
        file = DOCS.parent / place
        assert re.search(rf"^{table}\b", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        scope = {**vars(targets), **names}
        brackets = "({})" if isinstance(_parsed(block), ast.Tuple) else "{{{}}}"
        tables[table](eval(brackets.format("\n" + block), scope))
    return names


def _parsed(block: str) -> ast.expr:
    """Rows of a dictionary are no expression by themselves, those of a tuple are one."""
    try:
        return ast.parse(f"(\n{block})", mode="eval").body
    except SyntaxError:
        return ast.parse(f"{{\n{block}}}", mode="eval").body


def test_a_format_is_added_as_its_guide_says(tables: dict[str, Any]) -> None:
    names = follow("add_a_format.md", tables)
    assert isinstance(FORMATS["row_lists"], names["RowLists"])
    for config in test_formats.CONFIGS["row_lists"]:
        for kind in test_formats.special_matrices():
            test_formats.test_unpacking_restores_special_matrices("row_lists", config, kind)
        weight = test_formats.random_matrix(33, 60, 0.2, 0)
        packed = FORMATS["row_lists"].pack(weight, config)
        assert test_formats.same_bits(FORMATS["row_lists"].unpack(packed), weight)
        test_spies.check_order("row_lists", config, weight)
    assert not FORMATS["row_lists"].supports(weight, {"longest": 2})


def test_a_target_is_added_as_its_guide_says(tables: dict[str, Any]) -> None:
    names = follow("add_a_target.md", tables)
    assert names["module"].report.layers


def test_an_operator_is_added_as_its_guide_says(tables: dict[str, Any]) -> None:
    names = follow("add_an_operator.md", tables)
    assert names["layer"].is_sparse


def test_tables_are_what_they_were(tables: dict[str, Any]) -> None:
    assert "row_lists" not in FORMATS and "relax.nn.prelu" not in OPERATORS
