"""Nothing that a file holds is run, and nothing is offered to the network unasked."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tvm_sparse", "passes", "schedules", "deploy", "benchmarks")
MODULES = {
    str(path.relative_to(ROOT)): path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}

# Their readers run what they read.
RUNNING_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RUNNING_BUILTINS = {"eval", "exec", "compile", "__import__"}
# Functions that unpickle unless a keyword with this value keeps them from it; None where the
# default does.
UNPICKLING = {
    "numpy.load": ("allow_pickle", False, True),
    "numpy.lib.format.read_array": ("allow_pickle", False, True),
    "torch.load": ("weights_only", True, False),
    "yaml.load": ("Loader", "SafeLoader", False),
    "pandas.read_pickle": ("nothing", None, False),
}
# The one place that lets PyTorch read one of its own files, with its unpickling bound to tensors.
TORCH_READERS = {"tvm_sparse/frontends/torch.py"}

# What listens, by the ways in which Python and TVM do.
SERVER_MODULES = {
    "aiohttp.web",
    "fastapi",
    "flask",
    "http.server",
    "multiprocessing.managers",
    "socketserver",
    "tornado",
    "tvm.exec.rpc_proxy",
    "tvm.exec.rpc_server",
    "tvm.exec.rpc_tracker",
    "tvm.rpc.server",
    "tvm.rpc.tracker",
    "uvicorn",
    "wsgiref.simple_server",
    "xmlrpc.server",
}
LISTENING_CALLS = {"listen", "create_server", "start_server", "serve_forever", "Server", "Tracker"}
# A module that offers something to the network -> the one that says on which host by default. That
# is "127.0.0.1"; others are for the user to name.
SERVERS = {"tvm_sparse/serving/server.py": "tvm_sparse/serving/settings.py"}


def names_in(tree: ast.Module) -> dict[str, str]:
    """Return what the names of a module stand for: ``np`` for ``numpy``."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module), node.lineno
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def called(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Every call, by the full name of what is called."""
    names = names_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parts = ast.unparse(node.func).split(".")
            yield ".".join([names.get(parts[0], parts[0]), *parts[1:]]), node


def unsafe(source: str) -> list[str]:
    """List what a source does that would run what a file holds."""
    tree = ast.parse(source)
    found = [
        f"line {line}: imports {name}"
        for name, line in imported(tree)
        if name.partition(".")[0] in RUNNING_MODULES
    ]
    for name, call in called(tree):
        if name in RUNNING_BUILTINS:
            found.append(f"line {call.lineno}: calls {name}")
        keyword, safe, is_default = UNPICKLING.get(name, ("", None, True))
        given = {item.arg: ast.unparse(item.value).rpartition(".")[2] for item in call.keywords}
        if name in UNPICKLING and not (
            given[keyword] == str(safe) if keyword in given else is_default
        ):
            found.append(f"line {call.lineno}: {name} unpickles without {keyword}={safe}")
        if name == "torch.export.load":
            found.append(f"line {call.lineno}: {name} unpickles")
    return found


def listens(source: str) -> list[str]:
    """List the ways in which a source could open a port."""
    tree = ast.parse(source)
    found = [
        f"line {line}: imports {name}" for name, line in imported(tree) if name in SERVER_MODULES
    ]
    has_socket = any(name.partition(".")[0] == "socket" for name, _ in imported(tree))
    for name, call in called(tree):
        last = name.rpartition(".")[2]
        if last in LISTENING_CALLS or (has_socket and last == "bind"):
            found.append(f"line {call.lineno}: calls {name}")
    return found


@pytest.mark.parametrize("name", MODULES)
def test_no_module_runs_what_a_file_holds(name: str) -> None:
    found = unsafe(MODULES[name].read_text(encoding="utf-8"))
    if name in TORCH_READERS:
        (only,) = found
        assert only.endswith("torch.export.load unpickles")
        return
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import marshal as m",
        "eval(text)",
        "exec(open(path).read())",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "from numpy import load\nload(path, allow_pickle=flag)",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=False)",
        "import yaml\nyaml.load(text)",
        "import torch\ntorch.export.load(path)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import torch\ntorch.load(path, weights_only=True)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "module.eval()",
        "import re\nre.compile(text)",
    ],
)
def test_the_search_lets_pass_what_is_safe(source: str) -> None:
    assert unsafe(source) == []


@pytest.mark.parametrize("name", MODULES)
def test_no_module_listens_but_where_the_table_says_on_which_host(name: str) -> None:
    source = MODULES[name].read_text(encoding="utf-8")
    if name not in SERVERS:
        assert listens(source) == [], "a server needs a row in the table SERVERS"
        return
    assert listens(source) and "0.0.0.0" not in source
    assert 'host: str = "127.0.0.1"' in MODULES[SERVERS[name]].read_text(encoding="utf-8")


def test_nothing_listens_on_all_addresses_by_a_constant() -> None:
    for name, path in MODULES.items():
        texts = [
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        assert not {"0.0.0.0", "::"} & set(texts), name


@pytest.mark.parametrize(
    "source",
    [
        "import http.server",
        "from tvm import rpc\nrpc.Server()",
        "from tvm.rpc.tracker import Tracker",
        "import socket\ns = socket.socket()\ns.bind(('', 9090))",
        "import socket\nsocket.create_server(('', 9090))",
    ],
)
def test_the_search_finds_what_listens(source: str) -> None:
    assert listens(source)
