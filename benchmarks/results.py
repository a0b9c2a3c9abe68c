"""The JSON that `kernels.py` writes: sections, each with its machine and its cases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tvm_sparse.files import write_text

VERSION = 1
# What may differ between cases that stand in one section.
_FREE = ("date", "limits")


class Store:
    """A file of results that grows case by case."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """Return the sections; none when there is no file or it is of another version."""
        try:
            data = json.loads(self.path.read_text())
        except (OSError, json.JSONDecodeError):
            return {}
        return data.get("sections", {}) if data.get("version") == VERSION else {}

    def add(self, section: str, environment: Mapping[str, Any], case: Mapping[str, Any]) -> None:
        """Put a case into its section, in place of an older one of its name.

        What was measured on another machine or with other versions is dropped.
        """
        sections = self.read()
        old = sections.get(section, {})
        kept = old.get("cases", []) if _same(old.get("environment", {}), environment) else []
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        sections[section] = {
            "environment": {**environment, "date": now},
            "cases": replaced(kept, {**case, "date": now}),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps({"version": VERSION, "sections": sections}, indent=1))


def replaced(cases: list[Any], case: Mapping[str, Any]) -> list[Any]:
    """Return the cases with one put in place of that of its name, or behind the others."""
    names = [old["name"] for old in cases]
    if case["name"] not in names:
        return [*cases, case]
    return [case if old["name"] == case["name"] else old for old in cases]


def _same(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return all(old.get(key) == value for key, value in new.items() if key not in _FREE)
