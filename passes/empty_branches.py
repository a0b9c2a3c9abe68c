"""Compute what stands in branches ahead of them, so that an If only chooses between results."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from .rewrite_main import main_of, with_main


def empty_branches(mod: tvm.IRModule) -> tvm.IRModule:
    """Move all of the branches of `main` into `main` itself, which must be free of side effects."""
    return with_main(mod, _Mover(mod).visit_expr(main_of(mod)))


@mutator
class _Mover(PyExprMutator):
    def visit_if_(self, branching: Any) -> Any:
        """Emit the bindings of both branches in front of the If."""
        branches = [branching.true_branch, branching.false_branch]
        results = [relax.SeqExpr([], self._moved(branch)) for branch in branches]
        return relax.If(self.visit_expr(branching.cond), *results)

    def _moved(self, branch: Any) -> Any:
        for block in branch.blocks:
            for binding in block.bindings:
                self.visit_binding(binding)
        return self.visit_expr(branch.body)
