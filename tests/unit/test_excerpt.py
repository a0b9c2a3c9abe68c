"""One file cut out of several modules does what they do, and needs none of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tvm_sparse import excerpt as excerpts
from tvm_sparse.excerpt import excerpt

LOW = '''
"""Low."""
import math
import os.path as paths
from collections.abc import Iterable, Sequence

# Two
# lines.
FACTOR: float = 2.0
UNUSED = math.pi


def double(values: Iterable[float]) -> list[float]:
    """Double."""
    return [FACTOR * value for value in values]


def unused() -> str:
    return paths.sep
'''
HIGH = '''
"""High."""
from .low import double, unused


@staticmethod
def quadruple(values: Sequence[float]) -> list[float]:
    return double(double(values))


class Other:
    pass
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(excerpts, "_FOLDER", tmp_path)
    (tmp_path / "low.py").write_text(LOW)
    (tmp_path / "high.py").write_text(HIGH.replace('"""High."""', "from typing import Sequence"))
    return tmp_path


def test_it_holds_what_is_needed_bottom_up_and_nothing_else(folder: Path) -> None:
    text = excerpt("high", ("quadruple",), "Some text.")
    names = [getattr(node, "name", None) for node in ast.parse(text).body]
    assert [name for name in names if name] == ["double", "quadruple"]
    assert text.startswith('"""Some text."""\n\nfrom __future__ import annotations\n')
    assert "# Two\n# lines.\nFACTOR: float = 2.0\n" in text
    assert "@staticmethod\ndef quadruple" in text
    for name in ("UNUSED", "unused", "math", "paths", "Other"):
        assert name not in text


def test_it_runs_alone(folder: Path) -> None:
    (folder / "alone.py").write_text(excerpt("high", ("quadruple",), "Alone."))
    code = "import alone; print(alone.quadruple([1, 2]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[4.0, 8.0]\n"


def test_one_name_for_two_things_is_refused(folder: Path) -> None:
    (folder / "high.py").write_text(HIGH + "\n\nFACTOR = 3\nboth = (FACTOR, double)\n")
    with pytest.raises(ValueError, match="'FACTOR' is one thing in"):
        excerpt("high", ("both",), "")


def test_an_import_that_one_file_cannot_have_is_refused(folder: Path) -> None:
    (folder / "high.py").write_text("def late():\n    from .low import double\n    return double\n")
    with pytest.raises(ValueError, match="high, line 2: an import"):
        excerpt("high", ("late",), "")


def test_the_loader_of_packages_refers_to_nothing_that_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "load.py"
    path.write_text(excerpt("packaged", ("load",), "The loader."))
    assert path.stat().st_size < 64 << 10
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
