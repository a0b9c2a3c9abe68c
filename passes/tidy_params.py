"""Order the weights by their first use, and give each the plainest name that is free."""

from __future__ import annotations

from typing import Any

from tvm import relax

from ..model import Model
from .rewrite_main import MainRewriter, base_name, bindings_of, operands_of


def tidy_params(model: Model) -> Model:
    """Rename ``w__v1`` to ``w`` when `w` itself was folded away, and sort the weights."""
    rewriter = MainRewriter(model)
    _sort_by_first_use(rewriter)
    taken = {var.name for var in rewriter.func.params}
    for var in list(rewriter.params):
        base = base_name(var.name)
        if base not in taken:
            taken.add(base)
            rewriter.remap[var] = _renamed(rewriter, var, base)
    return rewriter.run(_keep)


def _sort_by_first_use(rewriter: MainRewriter) -> None:
    order: dict[Any, int] = {}
    for binding in bindings_of(rewriter.func):
        for leaf in operands_of(binding.value):
            if leaf in rewriter.params:
                order.setdefault(leaf, len(order))
    ordered = sorted(rewriter.params, key=lambda var: order.get(var, len(order)))
    rewriter.params = {var: rewriter.params[var] for var in ordered}


def _renamed(rewriter: MainRewriter, var: Any, name: str) -> Any:
    fresh = relax.Var(name, var.ty)
    # The dictionary keeps its order: the new variable stands where the old one stood.
    rewriter.params = {
        (fresh if key is var or key.same_as(var) else key): value
        for key, value in rewriter.params.items()
    }
    rewriter.layers[fresh] = rewriter.layers[var]
    return fresh


def _keep(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
    return None
