"""Profile the weights of a checkpoint without a graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .frontends.checkpoint import Entry, open_checkpoint
from .profile import profile_weight
from .report import LayerReport, Report

# Dimensions of a weight, [outputs, inputs, taps...] in PyTorch -> what it is most likely of.
_OPERATORS = {2: "matmul", 3: "conv1d", 4: "conv2d", 5: "conv3d"}


def inspect_checkpoint(source: Any) -> Report:
    """Profile every weight of two dimensions or more of a checkpoint, by name.

    Parameters
    ----------
    source
        A safetensors file, its index, or its folder.

    Returns
    -------
    Report
        As `inspect` gives it; shapes are as the checkpoint has them. Of a mask without its weight,
        the zeros are profiled.

    Raises
    ------
    ModelError
        When it cannot be read.
    MissingExtraError
        When the package safetensors is not installed.
    """
    checkpoint = open_checkpoint(source)
    layers = tuple(
        _layer(entry) for entry in checkpoint.entries.values() if len(entry.shape) in _OPERATORS
    )
    return Report(checkpoint.title, layers=layers, notes=tuple(_notes(checkpoint.refused)))


def _layer(entry: Entry) -> LayerReport:
    value = entry.read()
    # Not -1: NumPy cannot tell it where there are no elements.
    matrix = value.reshape(value.shape[0], math.prod(value.shape[1:]))
    # Of numbers: a mask's zeros are counted like a weight's.
    matrix = matrix.astype(np.float32) if entry.is_mask else matrix
    profile = profile_weight(matrix, taps=int(np.prod(value.shape[2:])))
    return LayerReport(
        name=entry.name.removesuffix(".weight"),
        op=_OPERATORS[value.ndim],
        shape=value.shape,
        dtype="mask" if entry.is_mask else str(value.dtype),
        density=profile.density,
        pattern=profile.pattern,
        nnz=profile.nnz,
        findings=profile.findings,
        bytes_dense=None if entry.is_mask else int(value.nbytes),
    )


def _notes(refused: Mapping[str, str]) -> Iterator[str]:
    yield "without a graph, tables of embeddings look like the weights of products"
    for name, reason in refused.items():
        yield f"'{name}' is left out: {reason}"
