"""Weights as pruning leaves them, and as nobody would wish them: [rows, columns] float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Pattern = Callable[[np.random.Generator, np.ndarray], np.ndarray]


def _kept(keep: Callable[[np.random.Generator, int, int], np.ndarray]) -> Pattern:
    """Make a pattern of a rule that says which elements stay, whatever was pruned before."""

    def apply(rng: np.random.Generator, weight: np.ndarray) -> np.ndarray:
        return np.where(keep(rng, *weight.shape), weight, np.float32(0))

    return apply


def _filled(fill: Callable[[np.random.Generator, int, int], np.ndarray]) -> Pattern:
    """Make a pattern of a rule that says which elements are nonzero beside the others."""

    def apply(rng: np.random.Generator, weight: np.ndarray) -> np.ndarray:
        values = rng.standard_normal(weight.shape).astype(np.float32)
        return np.where(fill(rng, *weight.shape), values, weight)

    return apply


def _single(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    mask = np.zeros((rows, columns), bool)
    mask[rng.integers(rows), rng.integers(columns)] = True
    return mask


def _blocks(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    blocks = rng.random((-(-rows // 4), -(-columns // 4))) < 0.2
    return np.kron(blocks, np.ones((4, 4), bool))[:rows, :columns]


def _two_of_four(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    ranks = rng.random((rows, -(-columns // 4), 4)).argsort(axis=2).argsort(axis=2)
    return (ranks < 2).reshape(rows, -1)[:, :columns]


def _band(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    centre = np.arange(rows)[:, None] * columns / rows
    return np.abs(np.arange(columns)[None] - centre) <= 2


def _scaled(draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]) -> Pattern:
    def apply(rng: np.random.Generator, weight: np.ndarray) -> np.ndarray:
        return (weight * draw(rng, weight.shape)).astype(np.float32)

    return apply


PATTERNS: dict[str, Pattern] = {
    "as drawn": lambda rng, weight: weight,
    "empty rows": _kept(lambda rng, rows, columns: rng.random((rows, 1)) < 0.5),
    "empty columns": _kept(lambda rng, rows, columns: rng.random((1, columns)) < 0.5),
    "empty first half": _kept(lambda rng, rows, columns: np.arange(rows)[:, None] >= rows // 2),
    "one dense row": _filled(
        lambda rng, rows, columns: np.arange(rows)[:, None] == rng.integers(rows)
    ),
    "one dense column": _filled(
        lambda rng, rows, columns: np.arange(columns)[None] == rng.integers(columns)
    ),
    "blocks": _filled(_blocks),
    "two of four": lambda rng, weight: _filled(_two_of_four)(rng, 0 * weight),
    "band": lambda rng, weight: _filled(_band)(rng, 0 * weight),
    "all zero": lambda rng, weight: 0 * weight,
    "all dense": _filled(lambda rng, rows, columns: np.ones((rows, columns), bool)),
    "single nonzero": lambda rng, weight: _filled(_single)(rng, 0 * weight),
    "negative zeros": lambda rng, weight: np.where(weight == 0, np.float32(-0.0), weight),
    "denormals": _scaled(lambda rng, shape: np.float32(1e-40)),
    "huge": _scaled(lambda rng, shape: np.float32(1e34)),
    "all magnitudes": _scaled(lambda rng, shape: 10.0 ** rng.uniform(-44, 34, shape)),
}
