"""Whether a model computes each row of a batch for itself: what putting requests together needs.

A first size with a name need not count rows of a batch: it may count the tokens of one text, and
then two requests put together would read each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..dtypes import FLOAT_TYPES, is_float, numpy_dtype
from ..errors import InputError, SparseError
from ..model import TensorSpec
from ..runtime import Runner

# Rows of three requests, which are run alone and then together.
_PARTS = (1, 2, 1)
_TRIALS = 2
_USUAL_SIZE = 8

# Sums that are added up in another order differ by so many roundings of the largest number.
_ROUNDINGS = 2.0**14


def batch_size_name(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str | None:
    """Return the symbolic size that all inputs and outputs begin with and have nowhere else."""
    firsts = {spec.shape[0] if spec.shape else 0 for spec in (*inputs, *outputs)}
    name = firsts.pop()
    if firsts or not isinstance(name, str):
        return None
    others = (size for spec in (*inputs, *outputs) for size in spec.shape[1:])
    return None if name in others else name


def check_rows(module: Runner, max_sizes: Mapping[str, int]) -> bool:
    """Run random rows alone and together.

    Returns
    -------
    bool
        Whether they are equal bit for bit; otherwise they are but for rounding.

    Raises
    ------
    SparseError
        When rows are not independent of each other, or that cannot be seen.
    """
    if batch_size_name(module.inputs, module.outputs) is None:
        raise SparseError(
            "requests cannot be put together: the model's inputs and outputs do not all begin with "
            "one symbolic size; serve it without --max-batch"
        )
    rng = np.random.default_rng(0)
    return all([_is_equal(module, rng, max_sizes) for _ in range(_TRIALS)])


def _is_equal(module: Runner, rng: np.random.Generator, max_sizes: Mapping[str, int]) -> bool:
    rows = sum(_PARTS)
    inputs = {spec.name: _random(spec, rows, rng, max_sizes) for spec in module.inputs}
    ends = np.cumsum(_PARTS)
    parts = {name: np.split(array, ends[:-1]) for name, array in inputs.items()}
    try:
        together = module.run(inputs)
        alone = [
            module.run({name: part[i] for name, part in parts.items()}) for i in range(len(_PARTS))
        ]
    except InputError as error:
        raise SparseError(
            f"whether requests can be put together cannot be seen on random inputs: {error}"
        ) from None
    joined = {name: np.concatenate([each[name] for each in alone]) for name in together}
    for name, array in together.items():
        if not _is_close(array, joined[name]):
            raise SparseError(
                f"requests cannot be put together: the rows of the output '{name}' depend on each "
                "other; serve the model without --max-batch"
            )
    return all(array.tobytes() == joined[name].tobytes() for name, array in together.items())


def _random(
    spec: TensorSpec, rows: int, rng: np.random.Generator, max_sizes: Mapping[str, int]
) -> np.ndarray:
    shape = [rows]
    for size in spec.shape[1:]:
        usual = min(_USUAL_SIZE, max_sizes.get(str(size), _USUAL_SIZE))
        shape.append(size if isinstance(size, int) else usual)
    if is_float(spec.dtype):
        return rng.standard_normal(shape).astype(numpy_dtype(spec.dtype))
    # Small enough to be an index of anything.
    return rng.integers(0, 2, shape).astype(spec.dtype)


def _is_close(array: np.ndarray, other: np.ndarray) -> bool:
    if array.shape != other.shape:
        return False
    if not is_float(array.dtype):
        return bool(np.array_equal(array, other))
    first, second = array.astype(np.float64), other.astype(np.float64)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return False
    kind = FLOAT_TYPES.get(array.dtype.name)
    bound = _ROUNDINGS * (kind.roundoff if kind else 2.0**-53)
    largest = float(np.abs(second).max(initial=0.0))
    # Never more than a twentieth: rows that mix differ by as much as they are large.
    return bool(np.abs(first - second).max(initial=0.0) <= min(bound, 0.05) * largest)
