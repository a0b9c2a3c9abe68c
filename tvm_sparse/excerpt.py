"""Cut definitions, and what they need, out of this package's sources: a file that runs alone.

So the loader in a package is the very code that this package runs and tests, not a variant of it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

_FOLDER = Path(__file__).parent


def excerpt(root: str, names: tuple[str, ...], docstring: str) -> str:
    """Write a Python file with some definitions of a module and all that they refer to.

    Parameters
    ----------
    root : str
        A module of this package, by its name in it.
    names : tuple of str
        What is asked of it.
    docstring : str
        The new file's own.

    Returns
    -------
    str
        Modules follow each other as they import each other, and definitions as they did; comments
        above them come along.

    Raises
    ------
    ValueError
        When two of the modules call different things by one name, or one imports this package
        inside of a function: that would not work in one file.
    """
    collector = _Collector()
    for name in names:
        collector.need(root, name)
    # Bottom up: what a module needs of others at its top stands above it.
    parts = [source.kept() for source in collector.finished()]
    head = f'"""{docstring}"""\n\nfrom __future__ import annotations\n\n{collector.import_lines()}'
    return "\n\n\n".join([head, *parts]) + "\n"


@dataclass
class _Source:
    """One module: its text, and the statements at its top by the names that they define."""

    name: str
    wanted: set[int] = field(default_factory=set)

    @cached_property
    def text(self) -> str:
        return (_FOLDER / f"{self.name}.py").read_text(encoding="utf-8")

    @cached_property
    def statements(self) -> list[ast.stmt]:
        return ast.parse(self.text).body

    def find(self, name: str) -> int | None:
        """Return the number of the statement that defines a name, if one does."""
        for number, statement in enumerate(self.statements):
            if name in _defined(statement):
                return number
        return None

    def kept(self) -> str:
        """Return the wanted statements with the comments above them."""
        return "\n\n\n".join(self._lines(number) for number in sorted(self.wanted))

    def _lines(self, number: int) -> str:
        statement, lines = self.statements[number], self.text.splitlines()
        decorators = getattr(statement, "decorator_list", [])
        first = min([statement.lineno, *(each.lineno for each in decorators)]) - 1
        while first > 0 and lines[first - 1].startswith("#"):
            first -= 1
        return "\n".join(lines[first : statement.end_lineno])


class _Collector:
    def __init__(self) -> None:
        # Module to the names that are taken of it; none where it is imported itself.
        self.imports: dict[str, set[str]] = {}
        self._sources: dict[str, _Source] = {}
        self._owners: dict[str, str] = {}

    def need(self, module: str, name: str) -> None:
        """Keep a module's definition of a name, and what it refers to."""
        source = self._sources.setdefault(module, _Source(module))
        number = source.find(name)
        if number is None:
            return  # built in, or a local name
        statement = source.statements[number]
        if isinstance(statement, ast.ImportFrom) and statement.level:
            self.need(str(statement.module), name)
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            module, taken = _import_of(statement, name)
            self.imports.setdefault(module, set()).update(taken)
        elif number not in source.wanted:
            self._own(module, _defined(statement))
            source.wanted.add(number)
            for other in _names_in(module, statement):
                self.need(module, other)

    def import_lines(self) -> str:
        """Write the imports of other packages: Python's own first."""
        own = {name for name in self.imports if name.split(".")[0] in sys.stdlib_module_names}
        groups = []
        for modules in (own, set(self.imports) - own):
            plain = [f"import {module}" for module in modules if not self.imports[module]]
            taking = [
                f"from {module} import {', '.join(sorted(self.imports[module]))}"
                for module in modules
                if self.imports[module]
            ]
            groups.append("\n".join([*sorted(plain), *sorted(taking)]))
        return "\n\n".join(group for group in groups if group)

    def finished(self) -> Iterator[_Source]:
        """Yield the modules that something is kept of, each after those that it imports."""
        done: set[str] = set()

        def visit(source: _Source) -> Iterator[_Source]:
            if source.name in done:
                return
            done.add(source.name)
            for statement in source.statements:
                if isinstance(statement, ast.ImportFrom) and statement.module in self._sources:
                    yield from visit(self._sources[statement.module])
            if source.wanted:
                yield source

        for source in list(self._sources.values()):
            yield from visit(source)

    def _own(self, module: str, names: set[str]) -> None:
        for name in names:
            owner = self._owners.setdefault(name, module)
            if owner != module:
                raise ValueError(f"'{name}' is one thing in {owner} and another in {module}")


def _defined(statement: ast.stmt) -> set[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
    targets = (
        statement.targets
        if isinstance(statement, ast.Assign)
        else [statement.target]
        if isinstance(statement, ast.AnnAssign)
        else []
    )
    return {
        node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)
    }


def _names_in(module: str, statement: ast.stmt) -> list[str]:
    """List the names that a statement refers to, in the order of the source."""
    for node in ast.walk(statement):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise ValueError(f"{module}, line {node.lineno}: an import that one file cannot have")
    return [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]


def _import_of(statement: ast.Import | ast.ImportFrom, name: str) -> tuple[str, set[str]]:
    """Return the module that a name is imported from, and what is taken of it."""
    alias = next(a for a in statement.names if (a.asname or a.name.partition(".")[0]) == name)
    text = alias.name + (f" as {alias.asname}" if alias.asname else "")
    return (
        (str(statement.module), {text}) if isinstance(statement, ast.ImportFrom) else (text, set())
    )
