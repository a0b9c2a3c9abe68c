"""Holding results against a float64 reference: by layer in a derived bound, and the model whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .dtypes import FLOAT_TYPES, HALF_TYPES
from .errors import CheckError

# One rounding's largest relative error in float32.
UNIT_ROUNDOFF = FLOAT_TYPES["float32"].roundoff
_SMALLEST_NORMAL = FLOAT_TYPES["float32"].smallest_normal
# Units of roundoff that a term may cost tensor cores; `half_dot_bound` says why.
_TENSOR_CORE_ROUNDOFFS = 4
# Those that a product costs which is computed in three; `typed_dot_bound` says why.
_SPLIT_ROUNDOFFS = 13

# Whole-model tolerance, in float32 epsilons a layer; `model_tolerance` says why.
_EPSILONS_A_LAYER = 128.0
_HALF_EPSILONS_A_KERNEL = 16.0
_PEAK_TO_RMS = 8.0


@dataclass(frozen=True)
class LayerCheck:
    """How far a result is from its reference.

    Attributes
    ----------
    name : str
        The user's name of the layer or output.
    max_error, rms_error : float
        Absolute, over the elements that are finite on both sides.
    max_ratio : float
        Largest error as a share of what the bound allows; infinite when NaN or Inf do not coincide.
    """

    name: str
    max_error: float
    rms_error: float
    max_ratio: float

    @property
    def ok(self) -> bool:
        """Whether every element lies within its bound."""
        return self.max_ratio <= 1.0


def gamma(roundings: np.ndarray | int) -> np.ndarray:
    """Bound the relative error of a chain of roundings: n u / (1 - n u), u = 2**-24.

    The classical bound of (1 + d1)(1 + d2)...(1 + dn) - 1 for |di| <= u, when n u < 1 (Higham,
    *Accuracy and Stability of Numerical Algorithms*, lemma 3.1).
    """
    product = np.asarray(roundings, np.float64) * UNIT_ROUNDOFF
    if np.any(product >= 0.5):
        raise ValueError("the bound does not hold for sums of so many terms")
    return product / (1.0 - product)


def dot_bound(magnitude: np.ndarray, terms: np.ndarray | int, roundings: int = 0) -> np.ndarray:
    """Bound the float32 error of sums of products, in any order, fused or not.

    A term of a sum of `terms` products is rounded once as a product and at most `terms` - 1 times
    as part of a partial sum, so the result is off by at most gamma(terms) * sum |w| |x|. A fused
    multiply-add saves roundings, and splitting the sum over lanes or threads only shortens the
    chains. Products with a weight of zero are exact and are no terms. Each later operation of the
    epilogue adds one rounding of what it adds up, and each product that underflows adds at most
    the smallest normal number. The law of the design, c * K * eps * (|W| @ |X| + |b|), is this
    with eps = 2 u and c = (1 + roundings / K) / (2 - K eps): about one half for long sums.

    Parameters
    ----------
    magnitude : numpy.ndarray
        |W| @ |X| in float64, plus |b| and the other magnitudes that the epilogue adds.
    terms : array of int or int
        Products that are summed; broadcasts against `magnitude`.
    roundings : int
        Additions and other correctly rounded operations behind the sum. Operations whose slope is
        at most one (ReLU, Clip) round nothing and need none.

    Returns
    -------
    numpy.ndarray
        Of the shape of `magnitude`, in float64.
    """
    counts = np.asarray(terms, np.int64) + roundings
    return gamma(counts) * magnitude + counts * _SMALLEST_NORMAL


def half_dot_bound(magnitude: np.ndarray, terms: np.ndarray | int) -> np.ndarray:
    """Bound the error of sums of products of float16 or bfloat16 numbers, added up in float32.

    Their products are exact in float32. Tensor cores add t of them and a partial sum at once: all
    are aligned to the largest of these, and what lies behind float32's digits, or one or more
    digits behind them on recent cores, is cut off; so is what the result has too many. An addend
    or a result that is cut to float32's digits loses less than 2 u of the largest magnitude, an
    addend with one digit more less than u. The largest addend itself is not cut, hence a step loses
    at most 2 (t + 1) u of the sum of the magnitudes so far, and (t + 2) u with the digit more.
    Products with a weight of zero lose nothing, so that t may be as small as 1: at most 4 u a
    term. Chains of fused multiply-adds on other cores lose u a term.

    Sources: M. Fasi, N. J. Higham, M. Mikaitis, S. Pranesh, *Numerical behavior of NVIDIA tensor
    cores*, PeerJ Computer Science 7 (2021); B. Hickmann, D. Bradford, *Experimental analysis of
    matrix multiplication functional units*, ARITH (2019).

    Parameters
    ----------
    magnitude, terms
        As for `dot_bound`.

    Returns
    -------
    numpy.ndarray
        What the float32 sum may differ by; `rounded_bound` adds the rounding of the result.
    """
    return dot_bound(magnitude, _TENSOR_CORE_ROUNDOFFS * np.asarray(terms, np.int64))


def typed_dot_bound(
    magnitude: np.ndarray, terms: np.ndarray | int, dtype: str, *, on_tensor_cores: bool = False
) -> np.ndarray:
    """Bound the error of float32 sums of products of numbers of a type.

    On tensor cores a float32 is the sum of two numbers of 11 digits and a rest of at most 4 u of
    it. Of a product of two, the rests cost 8 u, and the product of the smaller numbers, each at
    most 2**-11 of theirs, another 4 u, and what these lose of each other less than one; the three
    products that are added up are terms as `half_dot_bound` has them.

    Parameters
    ----------
    magnitude, terms
        As for `dot_bound`.
    dtype : str
        Of the numbers.
    on_tensor_cores : bool
        Whether float32 may have been multiplied in three products (`schedules.cuda.multiplier`).
    """
    if dtype in HALF_TYPES:
        return half_dot_bound(magnitude, terms)
    if not on_tensor_cores:
        return dot_bound(magnitude, terms)
    added = 3 * _TENSOR_CORE_ROUNDOFFS * np.asarray(terms, np.int64)
    return dot_bound(magnitude, added + _SPLIT_ROUNDOFFS)


def rounded_bound(value: np.ndarray, bound: np.ndarray, dtype: str) -> np.ndarray:
    """Bound the error of a float32 result after it was rounded to `dtype`.

    A number within `bound` of `value` is at most |value| + bound; rounding it to the nearest moves
    it by at most the unit roundoff of the type times that, or, where the type has no more digits,
    half its smallest number. float32 results are not rounded again.
    """
    if dtype not in HALF_TYPES:
        return bound
    kind = FLOAT_TYPES[dtype]
    return bound + np.maximum(kind.roundoff * (np.abs(value) + bound), kind.smallest / 2)


def compare(name: str, got: np.ndarray, want64: np.ndarray, bound: np.ndarray) -> LayerCheck:
    """Measure a layer's error against its bound.

    Parameters
    ----------
    name : str
        The user's name of the layer.
    got : numpy.ndarray
        The kernel's result.
    want64 : numpy.ndarray
        The reference in float64, of the same shape.
    bound : numpy.ndarray
        Largest error allowed, element by element; broadcasts against `want64`.

    Raises
    ------
    CheckError
        When the shapes differ.
    """
    if got.shape != want64.shape:
        raise CheckError(f"'{name}' has shape {got.shape}, and the reference {want64.shape}")
    bound = np.broadcast_to(bound, want64.shape)
    computed = got.astype(np.float64)
    finite = np.isfinite(computed) & np.isfinite(want64) & np.isfinite(bound)
    error = np.abs(computed[finite] - want64[finite])
    ratio = _ratio(error, bound[finite])
    largest = FLOAT_TYPES.get(str(got.dtype), FLOAT_TYPES["float32"]).largest
    if not np.all(_coincide(computed[~finite], want64[~finite], bound[~finite], largest)):
        ratio = float("inf")
    max_error = float(error.max(initial=0.0))
    rms_error = float(np.sqrt(np.mean(np.square(error)))) if error.size else 0.0
    return LayerCheck(name, max_error, rms_error, ratio)


def check_layers(checks: Sequence[LayerCheck]) -> None:
    """Refuse when a layer is outside its bound.

    Raises
    ------
    CheckError
        One sentence that names the worst layer.
    """
    bad = [check for check in checks if not check.ok]
    if not bad:
        return
    worst = max(bad, key=lambda check: check.max_ratio)
    others = f" ({len(bad)} of {len(checks)} layers are outside theirs)" if len(bad) > 1 else ""
    raise CheckError(
        f"layer '{worst.name}' disagrees with the dense reference: {_says(worst)}{others}"
    )


def model_tolerance(depth: int) -> float:
    """Tell which relative error a float32 model of `depth` layers may show at its outputs.

    A layer with K terms adds a relative RMS error of about u sqrt(K / 6), that is 4 eps at K = 2048
    and 13 eps at K = 25088, and its activation (fast exp, erf, tanh) up to some 8 eps. Errors of
    different layers are independent and would add up as the square root of the depth; adding
    them up linearly leaves room for what a network amplifies. 128 eps a layer is ten times the
    largest of these, and still hundreds of times below what a wrong index or a lost block does.
    """
    return _EPSILONS_A_LAYER * max(depth, 1) * 2.0 * UNIT_ROUNDOFF


def half_model_tolerance(dtype: str, kernels: int, others: int) -> float:
    """Tell the same for a model in float16 or bfloat16.

    A layer with a kernel adds up in float32 and rounds its result once, a relative RMS error of
    0.3 eps of the type. What stands between two such layers (residuals, normalisations, softmax,
    the steps of a decomposed activation) rounds its results to the type as well, in the model and
    in the reference but not in the same places: up to ten operators on either side, errors of
    which add up to at most 0.6 eps each, 12 eps in all. 16 eps a layer leaves room. TVM's own
    schedules add up in the type itself: other layers get what `model_tolerance` says, in eps of
    the type.

    Parameters
    ----------
    dtype : str
        The narrowest type.
    kernels, others : int
        Layers that add up in float32, and layers that may not.
    """
    eps = 2.0 * FLOAT_TYPES[dtype].roundoff
    return eps * (_HALF_EPSILONS_A_KERNEL * kernels + _EPSILONS_A_LAYER * max(others, 1 - kernels))


def check_outputs(
    names: Sequence[str],
    got: Sequence[np.ndarray],
    want: Sequence[np.ndarray],
    tolerance: float,
    layers: Sequence[LayerCheck] = (),
) -> tuple[LayerCheck, ...]:
    """Hold a compiled model's outputs against the reference's.

    The strict part of a check is the one by layer; rounding errors of earlier layers reach the
    outputs amplified by the model itself, so here the RMS error is held against `tolerance` times
    the RMS of the output, and the largest error against eight times that share of the largest
    output (the peak of a normal distribution over a million elements is five times its RMS). NaN
    and Inf must coincide. Integers and booleans must be equal.

    Parameters
    ----------
    names : sequence of str
        The outputs' names.
    got, want : sequence of numpy.ndarray
        What the compiled model and the reference computed.
    tolerance : float
        `model_tolerance` or `half_model_tolerance` of the model.
    layers : sequence of LayerCheck
        The layers' checks, to name the likeliest cause.

    Returns
    -------
    tuple of LayerCheck
        One for each output; `max_ratio` is the larger of the two shares.

    Raises
    ------
    CheckError
        When an output is outside its tolerance.
    """
    if not len(names) == len(got) == len(want):
        raise CheckError(f"the model has {len(got)} outputs, and the reference {len(want)}")
    checks = tuple(
        _check_output(name, ours, reference, tolerance)
        for name, ours, reference in zip(names, got, want, strict=True)
    )
    bad = [check for check in checks if not check.ok]
    if bad:
        worst = max(bad, key=lambda check: check.max_ratio)
        raise CheckError(
            f"output '{worst.name}' disagrees with the dense reference: {_says(worst)}"
            + _suspect(layers)
        )
    return checks


def _check_output(name: str, got: np.ndarray, want: np.ndarray, tolerance: float) -> LayerCheck:
    if got.dtype.kind in "biu" or want.dtype.kind in "biu":
        return compare(name, got, want.astype(np.float64), np.zeros(()))
    want64 = want.astype(np.float64)
    finite = want64[np.isfinite(want64)]
    peak = float(np.abs(finite).max(initial=0.0))
    rms = float(np.sqrt(np.mean(np.square(finite)))) if finite.size else 0.0
    # Near its smallest numbers float16 has few digits: what is left of them may differ.
    half = FLOAT_TYPES[str(got.dtype)] if str(got.dtype) in HALF_TYPES else None
    least = _SMALLEST_NORMAL + (_HALF_EPSILONS_A_KERNEL * half.smallest if half else 0.0)
    by_peak = np.asarray(_PEAK_TO_RMS * tolerance * peak + least)
    check = compare(name, got, want64, by_peak)
    by_rms = check.rms_error / (tolerance * rms + least)
    return LayerCheck(name, check.max_error, check.rms_error, max(check.max_ratio, by_rms))


def _ratio(error: np.ndarray, bound: np.ndarray) -> float:
    # An exact result is within any bound, also within a bound of zero.
    off = error > 0
    if not off.any():
        return 0.0
    with np.errstate(divide="ignore"):
        return float(np.max(error[off] / bound[off]))


def _coincide(got: np.ndarray, want: np.ndarray, bound: np.ndarray, largest: float) -> np.ndarray:
    """Tell where non-finite results agree; a sum near the end of the type's range may overflow."""
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore", over="ignore"):
        overflows = np.isinf(got) & (np.sign(got) * want + bound >= largest)
    return same | overflows


def _says(check: LayerCheck) -> str:
    if np.isinf(check.max_ratio):
        return "it has NaN, Inf or other values where the reference has none, or the reverse"
    return f"its largest error {check.max_error:.3g} is {check.max_ratio:.3g} times what is allowed"


def _suspect(layers: Sequence[LayerCheck]) -> str:
    if not layers:
        return ""
    worst = max(layers, key=lambda check: check.max_ratio)
    return f"; its worst layer is '{worst.name}', at {worst.max_ratio:.3g} of its bound"
