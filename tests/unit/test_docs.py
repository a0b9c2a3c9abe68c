"""The pages: links lead somewhere, every public name is in the reference, examples run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import tvm_sparse

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md"])
IDS = [str(path.relative_to(ROOT)) for path in PAGES]


def links(text: str) -> list[str]:
    """Targets of links and pictures outside code."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(path: Path) -> set[str]:
    """Names that the headings of a page can be reached by."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def place_of(page: Path, target: str) -> Path:
    """Where a link leads; pages of tutorials are made of scripts."""
    path = (page.parent / target).resolve()
    if path.parent == DOCS / "tutorials":
        return ROOT / "tutorials" / f"{path.stem}.py"
    return path


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_between_pages_lead_to_what_is_there(page: Path) -> None:
    for link in links(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        place = place_of(page, target) if target else page
        assert place.is_file(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(place), f"{link}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_pages_name_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    folders = "tvm_sparse|passes|schedules|tests|benchmarks|tutorials"
    named = re.findall(rf"`((?:{folders})/[\w./]+)`", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"they are gone, or were renamed: {missing}"


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\.\. auto\w+:: tvm_sparse\.(\w+)$", text, flags=re.MULTILINE)
    assert set(tvm_sparse.__all__) <= set(listed)


@pytest.fixture
def extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Sphinx is extended by can be imported."""
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))


@pytest.mark.usefixtures("extensions")
@pytest.mark.parametrize("script", sorted((ROOT / "tutorials").glob("[0-9]*.py")), ids=str)
def test_a_tutorial_is_a_page_with_all_of_its_code(script: Path) -> None:
    from scripts_as_pages import page_of

    source = script.read_text(encoding="utf-8")
    page = page_of(source, "tutorials/x.py")
    assert page.startswith("# Tutorial ") and page.count("\n## ") >= 3
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE))
    # Without its docstring and its comments it is the same program.
    tree = ast.parse(source)
    tree.body = tree.body[1:]
    assert ast.dump(ast.parse(code)) == ast.dump(tree)


@pytest.mark.usefixtures("extensions")
def test_every_page_is_in_a_table_of_contents() -> None:
    from pages_left_over import PLACE, left_over, tables_of

    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert index.count(PLACE) == 1
    tables = [table.replace(PLACE, "") for page in PAGES for table in tables_of(page.read_text())]
    pages = {page.stem for page in DOCS.glob("*.md")}
    # What is not among these comes at the end, by itself.
    assert left_over(tables, {*pages, "from_elsewhere", "new"}) == ["new"]


@pytest.mark.usefixtures("extensions")
def test_groups_without_pages_are_left_out() -> None:
    from pages_left_over import without_empty_patterns

    table = ":glob:\n\ninstall\nadd_*\nfrom_*\n"
    assert without_empty_patterns(table, {"add_a_format"}) == ":glob:\n\ninstall\nadd_*\n\n"


def quoted_messages() -> Iterator[str]:
    """What pages say that this package says, without what stands for a user's own words."""
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^> (.+)$", text, flags=re.MULTILINE)
    quoted += re.findall(r"^\s*\| `(.+?)` \|", text, flags=re.MULTILINE)
    for message in quoted:
        yield from (part for part in re.split(r"\.\.\.", message) if len(part.strip()) > 3)


def messages() -> str:
    """Every text in the package's code, those that are written in parts put together."""
    found = []
    for folder in ("tvm_sparse", "passes", "schedules"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(_literal(part) for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def _literal(part: ast.expr) -> str:
    return part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "\0"


def test_messages_that_are_explained_are_those_that_are_raised() -> None:
    said = messages()
    unknown = [part for part in quoted_messages() if part.strip(" ;'") not in said]
    assert not unknown, f"no message says this any more: {unknown}"


@pytest.mark.parametrize("page", ["install.md", "coming_from.md"])
def test_examples_run(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert blocks
    names = {"__name__": page}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
