"""Profiling one weight: counting it, and recognising what its zeros amount to."""

from __future__ import annotations

import numpy as np

from ..errors import ModelError
from .counts import count
from .data import CountStats, SparsityProfile
from .detect import find, pattern


def profile_weight(w: np.ndarray, *, taps: int = 1) -> SparsityProfile:
    """Profile the zeros of a weight.

    A form is claimed only where chance does not produce it. The null hypothesis is a matrix of the
    same shape whose `nnz` nonzeros fell on cells drawn without replacement; every claim needs a
    probability of at most `parts.CHANCE` under it, multiplied by the number of sizes, places and
    rows that were tried:

    - *channel*, *kernel*, *block:RxC*, *tile-wise:G*: the number of parts without a nonzero, or of
      those that are more than half full, or not. Expectations E are exact (hypergeometric), and as
      the indicators are negatively associated, Chernoff's bound
      ``P(X >= x) <= exp(-(x ln(x/E) - x + E))`` holds.
    - *N:M*: the number of groups with too many nonzeros; the same bound from below, and where it
      holds exactly, the product of the groups' probabilities.
    - *V:N:M*: the number of groups of M columns of V rows whose nonzeros lie in four columns.

    Significance alone would also claim blocks in weights whose nonzeros merely clump, as those of
    real networks do. Hence the dropped parts must hold at least `parts.EXPLAINED` of all zeros, and
    the rest must be dense to at least `parts.EXPLAINED`: zeros may be strewn into what is kept. A
    few nonzeros (`parts.NEAR` of them) may stand where the form has none; it then holds nearly, and
    they are counted. Single elements beside tiles may be more, see `tilewise`.

    Where several claims stand, whole channels come first, then the largest parts. N:M is looked for
    where no parts are dropped as a whole, V:N:M before it, and the least likely wins.

    Parameters
    ----------
    w : numpy.ndarray
        The weight as [rows, columns], of any floating or integer type; it may be strided.
    taps : int
        Columns per input channel, for a convolution.

    Raises
    ------
    ModelError
        When `w` is no matrix of numbers, or `taps` does not divide its columns.

    See Also
    --------
    chance : the probabilities, with their sources.
    parts : how kept parts are told from dropped ones.
    """
    if w.ndim != 2:
        raise ModelError(f"a weight is profiled as a matrix, but this one has the shape {w.shape}")
    if taps < 1 or w.shape[1] % taps:
        raise ModelError(f"{w.shape[1]} columns are not a whole number of channels of {taps} taps")
    if w.dtype.kind in "OSUMmV" and not w.dtype.name.startswith(("bfloat", "float", "int")):
        raise ModelError(f"a weight of type {w.dtype} cannot be profiled")
    counts = count(w, taps)
    findings = find(w, counts)
    kernels = counts.kernels
    return SparsityProfile(
        shape=counts.shape,
        taps=taps,
        dtype=str(w.dtype),
        nnz=counts.nnz,
        density=counts.nnz / counts.size if counts.size else 0.0,
        row_nnz=_stats(counts.rows),
        column_nnz=_stats(counts.columns),
        empty_rows=int(np.count_nonzero(counts.rows == 0)),
        empty_columns=int(np.count_nonzero(counts.columns == 0)),
        empty_channels=int(np.count_nonzero(counts.channels == 0)),
        empty_kernels=None if kernels is None else int(kernels[0]),
        blocks=counts.blocks,
        nm=counts.nm,
        tiles=counts.tiles,
        pattern=pattern(counts, findings),
        findings=findings,
    )


def _stats(counts: np.ndarray) -> CountStats:
    if not counts.size:
        return CountStats(0.0, 0, 0, 0.0)
    mean = float(counts.mean())
    cv = float(counts.std()) / mean if mean else 0.0
    return CountStats(mean, int(counts.min()), int(counts.max()), cv)
