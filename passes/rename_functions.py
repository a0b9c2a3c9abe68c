"""Give functions of a module other names, wherever they are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator


def rename_functions(mod: tvm.IRModule, names: Mapping[str, str]) -> tvm.IRModule:
    """Rename functions, all at once; calls of them and their global symbols follow.

    Parameters
    ----------
    names : mapping of str to str
        Old name to new; names that the module lacks are left out.
    """
    renamed: dict[Any, Any] = {}
    for old in mod.get_global_vars():
        if old.name_hint in names:
            renamed[old] = tvm.ir.GlobalVar(names[old.name_hint])
            relax.expr._update_type(renamed[old], mod[old].ty)
    rewriter = _Renamer(mod, renamed)
    functions: dict[Any, Any] = {}
    for name, function in mod.functions_items():
        new = renamed.get(name, name)
        if isinstance(function, relax.Function):
            function = rewriter.visit_expr(function)
        if name in renamed and "global_symbol" in dict(function.attrs or {}):
            function = function.with_attr("global_symbol", new.name_hint)
        functions[new] = function
    return tvm.IRModule(functions, attrs=mod.attrs, global_infos=mod.global_infos)


@mutator
class _Renamer(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, renamed: Mapping[Any, Any]) -> None:
        super().__init__(mod)
        self.renamed = renamed

    def visit_global_var_(self, variable: Any) -> Any:
        """Replace a function's name where it is called."""
        return self.renamed.get(variable, variable)
