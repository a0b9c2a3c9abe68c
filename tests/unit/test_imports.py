"""Imports run one way, and what needs no TVM does not load it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From the bottom up: a module imports from its own layer and from those above it in this table.
# A name stands for the module, or the package with all that is in it, under tvm_sparse.
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "plain data",
        (
            "errors",
            "files",
            "dtypes",
            "workload",
            "cache",
            "cpu_features",
            "cache_key",
            "targets",
            "model",
            "progress",
            "findings",
            "spy",
            "report",
            "report_html",
            "panels",
            "plain_data",
            "claims",
            "onnx_check",
        ),
    ),
    (
        "runtime",
        (
            "manifest",
            "thread_pool",
            "instances",
            "memory_pool",
            "device",
            "cuda_toolkit",
            "weights",
            "opening",
            "package_manifest",
            "runtime",
            "packaged",
        ),
    ),
    ("truth", ("check", "epilogue_reference", "float64")),
    ("zeros", ("profile", "formats")),
    ("operators", ("ops",)),
    ("kernels", ("schedules",)),
    ("tuning", ("records", "tuning")),
    ("planning", ("planner", "calibration")),
    ("passes", ("passes",)),
    ("front ends", ("frontends", "inspection", "reference")),
    ("pipeline", ("layout", "pipeline")),
    ("checks", ("verify", "layer_details")),
    ("deployment", ("deploy", "excerpt", "packaging", "deployment")),
    ("compilation", ("compiler", "plugin", "tuner")),
    ("tools", ("bench", "demo", "zoo", "pruning", "session")),
    ("serving", ("serving",)),
    ("command line", ("cli", "__main__")),
)
RANK = {name: rank for rank, (_, names) in enumerate(LAYERS) for name in names}

# These may not load TVM: they serve tools that look at weights only.
WITHOUT_TVM = (
    "errors",
    "dtypes",
    "workload",
    "model",
    "progress",
    "findings",
    "spy",
    "report",
    "report_html",
    "panels",
    "plain_data",
    "claims",
    "profile",
    "formats",
)

FOLDERS = {
    "tvm_sparse": "tvm_sparse",
    "deploy": "tvm_sparse.deployment",
    "passes": "tvm_sparse.passes",
    "schedules": "tvm_sparse.schedules",
}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package: its dotted name, and its file."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *inner)).removesuffix(".__init__"), path


MODULES = dict(modules())


def imports(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """Every module that `name` imports, inside functions too, with the line."""
    is_package = path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                kept = parts[: len(parts) - node.level + is_package]
                base = ".".join([*kept, base] if base else kept)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in MODULES else base), node.lineno


def layer_name(module: str) -> str:
    return module.split(".")[1]


INNER = sorted(name for name in MODULES if name != "tvm_sparse")


@pytest.mark.parametrize("name", INNER)
def test_every_module_has_a_layer(name: str) -> None:
    assert layer_name(name) in RANK, (
        f"{name} has no layer: add '{layer_name(name)}' to the table LAYERS in "
        f"{Path(__file__).name}, in the lowest layer from which it can import what it needs"
    )


@pytest.mark.parametrize("name", INNER)
def test_imports_run_one_way(name: str) -> None:
    rank = RANK.get(layer_name(name), len(LAYERS))
    for target, line in imports(name, MODULES[name]):
        if not target.startswith("tvm_sparse.") or layer_name(target) not in RANK:
            continue
        above = RANK[layer_name(target)]
        assert above <= rank, (
            f"{name}, line {line}: imports {target} of the layer '{LAYERS[above][0]}', "
            f"which stands above its own, '{LAYERS[rank][0]}'"
        )


@pytest.mark.parametrize("name", INNER)
def test_modules_import_each_other_relatively(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert (node.module or "").split(".")[0] not in FOLDERS, f"{name}, line {node.lineno}"


@pytest.mark.parametrize("name", [name for name in INNER if layer_name(name) in WITHOUT_TVM])
def test_what_looks_at_weights_only_never_imports_tvm(name: str) -> None:
    for target, line in imports(name, MODULES[name]):
        assert target.split(".")[0] != "tvm", f"{name}, line {line}"


def loaded_after(*names: str) -> set[str]:
    """Which packages are loaded after importing modules in a new process."""
    code = f"import sys; import {', '.join(names)}; print(' '.join(m for m in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return {module.split(".")[0] for module in result.stdout.split()}


def test_importing_the_package_is_cheap() -> None:
    # TVM imports it while it loads itself, by the entry point.
    assert not loaded_after("tvm_sparse") & {"tvm", "onnx", "scipy", "torch", "onnxruntime"}


def test_what_looks_at_weights_only_never_loads_tvm() -> None:
    names = [name for name in INNER if layer_name(name) in WITHOUT_TVM]
    assert "tvm" not in loaded_after("tvm_sparse", *names)
