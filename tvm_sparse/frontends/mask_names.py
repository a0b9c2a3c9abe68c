"""How tools that prune while training call a weight and its mask."""

from __future__ import annotations

import re

import numpy as np

_PARAMETRIZED = re.compile(r"(.*\.)?parametrizations\.(\w+)\.original")

# Of PyTorch's prune (and of most others); of its parametrisations, `prune_module`'s too; and of
# NNCF's hooks, which write colons for the dots of a name.
_SUFFIXED = re.compile(r"(.*\w)_mask")
_PARAMETRIZATION = re.compile(r"(.*\.)?parametrizations\.(\w+)\.\d+\.mask")
_HOOK = re.compile(r"(.*\.)?__nncf_hooks\.\w+_hooks\.(.+)__\d+\.\d+\.(?:binary_)?mask")


def plain_name(name: str) -> str:
    """Name a parameter as it was called before its tool renamed it: ``fc.weight_orig`` and others.

    A name that no tool wrote is returned as it is.
    """
    if match := _PARAMETRIZED.fullmatch(name):
        return (match[1] or "") + match[2]
    return name.removesuffix("_orig")


def masked_weight(name: str) -> str | None:
    """Name the weight that a mask of this name would hide; None where it is no mask's name."""
    if match := _PARAMETRIZATION.fullmatch(name):
        return (match[1] or "") + match[2]
    if match := _HOOK.fullmatch(name):
        return (match[1] or "") + match[2].replace(":", ".")
    match = _SUFFIXED.fullmatch(name)
    return match[1] if match else None


def is_logit(name: str) -> bool:
    """Say whether a mask is one that NNCF trains: it keeps what is positive."""
    return _HOOK.fullmatch(name) is not None and not name.endswith(".binary_mask")


def is_binary(value: np.ndarray) -> bool:
    """Say whether an array holds zeros and ones only."""
    return value.dtype == bool or bool(np.all((value == 0) | (value == 1)))
