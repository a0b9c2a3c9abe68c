"""Find chains of elementwise operators that no product takes in: each may be one kernel."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .fuse_epilogue import Body, FusedEpilogue, Growth
from .rewrite_main import call_of, dtype_of, static_shape


def elementwise_chains(body: Body, taken: Collection[int]) -> list[FusedEpilogue]:
    """Cover the elementwise operators in float32 by long chains that leave one value each.

    A chain grows backwards from the value that it leaves: whatever only members read is a member.
    Its graph has no `acc`; everything that it reads is a tensor, a vector along the last axis, or a
    scalar.

    Parameters
    ----------
    body : Body
        The model's `main`.
    taken : collection of int
        Bindings that belong to another kernel.
    """
    free = set(range(len(body.bindings))) - set(taken)
    found = []
    for result in reversed(range(len(body.bindings))):
        like = body.bindings[result][0]
        shape = static_shape(like)
        if result not in free or shape is None or len(shape) < 2 or dtype_of(like) != "float32":
            continue
        # A reshape alone is a view.
        if not call_of(body.bindings[result][1], "reshape") and _is_elementwise(body, result, like):
            members = _members(body, result, free)
            free -= members
            found.append(_growth(body, like).fused(members, result))
    return [chain for chain in found if chain.tensors]


def _members(body: Body, result: int, free: Collection[int]) -> frozenset[int]:
    like, members = body.bindings[result][0], {result}
    for index in reversed(range(result)):
        users = body.users.get(body.bindings[index][0].name, [])
        if index in free and users and members.issuperset(users):
            if _is_elementwise(body, index, like):
                members.add(index)
    return frozenset(members)


def _is_elementwise(body: Body, index: int, like: Any) -> bool:
    return _growth(body, like).join(index)


def _growth(body: Body, like: Any) -> Growth:
    return Growth(body, like, lambda ndim: ndim - 1, {})
