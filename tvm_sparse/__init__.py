"""A sparse compiler plug-in for Apache TVM."""

from __future__ import annotations

__version__ = "0.1.0"


def _autoload() -> None:
    """Entry point `tvm.backends`, called while TVM is imported."""
