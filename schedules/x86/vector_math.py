"""Elementary functions of float32 vectors as TIR expressions: no calls to libm, any lane count.

The polynomials are own least-maximum fits (Lawson's algorithm, float64) on the ranges that the
comments name; range reduction for `exp` is the classic one of Cody and Waite. Stated errors are
against float64 and hold with and without fused multiply-add; tests measure them over dense grids.
NaN stays NaN everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

# TVM's expression classes carry no static operators.
Expr = Any
VectorFunction = Callable[[Expr, int], Expr]

LOG2_E = 1.4426950408889634
# ln 2 in two parts, the first with so few bits that its product with any exponent is exact.
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440054690583e-4
# Below, exp is less than half the smallest denormal; above, it overflows.
_EXP_LOW, _EXP_HIGH = -104.0, 89.0
# 1.5 * 2^23: adding it leaves a small integer in the low bits of the float.
_INTEGER_SHIFT = 12582912.0

# (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, to 3e-9.
_EXP = (0.5, 0.166665181517601, 0.04166620597243309, 0.008368908427655697, 0.0013950522989034653)
# erf(x) / x - 1 in x^2 on |x| <= 1, to 2e-9.
_ERF_SMALL = (
    0.12837916612625122,
    -0.3761262595653534,
    0.1128358542919159,
    -0.026853814721107483,
    0.00518833240494132,
    -0.0008010230958461761,
    7.853973511373624e-05,
)
# log(1 - erf(x)) / x on 1 <= x <= 4; erf to 3e-9.
_ERF_LARGE = (
    -1.128475546836853,
    -0.6358463764190674,
    -0.10509669780731201,
    0.022786105051636696,
    -0.0031831234227865934,
    0.00021018284314777702,
)
# (log2(erfc(x / sqrt(2)) / 2) + 1) / x on 0 <= x <= 5.5, so that x times this tail of the normal
# distribution is off by at most 2.2e-8 max(1, x).
_TAIL = (
    -1.151119302218368,
    -0.4590947846812534,
    -0.052828888032931856,
    0.007539512963064436,
    -0.0005034221458307342,
    -3.2120717119511984e-05,
    6.2558313860267125e-06,
)
# Beyond, x times the tail is below 2e-8 x.
_TAIL_END = 5.5
# 2^r on |r| <= 1/2, to 2e-9.
_EXP2 = (
    1.0,
    0.6931472057423063,
    0.24022646890399396,
    0.055503287659372166,
    0.009618488941471031,
    0.0013399935707348815,
    0.0001534582735665305,
)
# (tanh(x) / x - 1) / x^2 in x^2 on |x| <= 0.625, to 5e-9.
_TANH_SMALL = (
    -0.3333328366279602,
    0.13331490755081177,
    -0.05374349653720856,
    0.020650584250688553,
    -0.005717040505260229,
)


def _dtype(base: str, lanes: int) -> str:
    return base if lanes == 1 else f"{base}x{lanes}"


def _spread(value: Expr, lanes: int) -> Expr:
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def _float(value: float, lanes: int) -> Expr:
    return _spread(tirx.FloatImm("float32", value), lanes)


def _int(value: int, lanes: int) -> Expr:
    return _spread(tirx.IntImm("int32", value), lanes)


def _let(value: Expr, body: Callable[[Expr], Expr], dtype: str) -> Expr:
    """Name a value that is used several times: a tree would compute it again at each use."""
    var = tirx.Var("t", dtype)
    return tirx.Let(var, value, body(var))


def _polynomial(coefficients: Sequence[float], x: Expr, lanes: int) -> Expr:
    result = _float(coefficients[-1], lanes)
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + _float(coefficient, lanes)
    return result


def _exponent_bits(n: Expr, lanes: int) -> Expr:
    """2^n as a float, for integers n of a normal float."""
    return tirx.reinterpret(
        _dtype("float32", lanes),
        tirx.shift_left(n + _int(127, lanes), _int(23, lanes)),
    )


def _exp(x: Expr, lanes: int, scale: Callable[[Expr, Expr], Expr]) -> Expr:
    """Evaluate exp as scale(exp(r), n) with x = n ln 2 + r and |r| <= ln(2) / 2."""
    kind, whole = _dtype("float32", lanes), _dtype("int32", lanes)

    def reduced(n: Expr) -> Expr:
        r = x - n * _float(_LN2_HIGH, lanes) - n * _float(_LN2_LOW, lanes)
        # A cast of NaN to an integer is undefined in LLVM; the bits of a shifted float are not.
        shifted = tirx.reinterpret(whole, n + _float(_INTEGER_SHIFT, lanes))
        exponent = shifted - _int(0x4B400000, lanes)
        return _let(
            r,
            lambda r: _let(
                exponent,
                lambda e: scale(r * r * _polynomial(_EXP, r, lanes) + r + _float(1.0, lanes), e),
                whole,
            ),
            kind,
        )

    return _let(tirx.nearbyint(x * _float(LOG2_E, lanes)), reduced, kind)


def exp(x: Expr, lanes: int) -> Expr:
    """Exponential of a float32 vector.

    Parameters
    ----------
    x : PrimExpr
        float32 with `lanes` lanes; evaluated once.
    lanes : int
        Lanes of `x`; 1 for a scalar.

    Returns
    -------
    PrimExpr
        At most 2 ulp off where the result is a normal float, one smallest denormal where it is
        not; overflow gives infinity, underflow 0.
    """
    kind = _dtype("float32", lanes)

    def scaled(p: Expr, n: Expr) -> Expr:
        # Two steps: 2^n itself is no normal float at either end of the range.
        half = tirx.shift_right(n, _int(1, lanes))
        return _let(
            half,
            lambda h: p * _exponent_bits(h, lanes) * _exponent_bits(n - h, lanes),
            _dtype("int32", lanes),
        )

    # max(a, b) is `a > b ? a : b`: NaN survives only as the second operand.
    clamped = tirx.Min(_float(_EXP_HIGH, lanes), tirx.Max(_float(_EXP_LOW, lanes), x))
    return _let(clamped, lambda x: _exp(x, lanes, scaled), kind)


def exp_nonpositive(x: Expr, lanes: int) -> Expr:
    """Exponential of a float32 vector that is known to be at most 0, as in softmax.

    Parameters
    ----------
    x : PrimExpr
        float32 with `lanes` lanes, at most 0 or NaN; evaluated once.
    lanes : int
        Lanes of `x`; 1 for a scalar.

    Returns
    -------
    PrimExpr
        At most 2 ulp off down to exp(-87); below that, results lie between 0 and 2e-38.
    """
    kind = _dtype("float32", lanes)
    # -127 bits of exponent give exactly 0.
    clamped = tirx.Max(_float(-88.0, lanes), x)
    return _let(clamped, lambda x: _exp(x, lanes, lambda p, n: p * _exponent_bits(n, lanes)), kind)


def _power_of_two(y: Expr, lanes: int) -> Expr:
    """2^y for a name that stands for -126 <= y <= 127 or NaN; elsewhere anything."""
    kind, whole = _dtype("float32", lanes), _dtype("int32", lanes)

    def reduced(n: Expr) -> Expr:
        # The exponent's bits; what else the sum holds leaves the word at the top.
        biased = tirx.reinterpret(whole, n + _float(_INTEGER_SHIFT + 127, lanes))
        scale = tirx.reinterpret(kind, tirx.shift_left(biased, _int(23, lanes)))
        return _polynomial(_EXP2, y - n, lanes) * scale

    return _let(tirx.nearbyint(y), reduced, kind)


def exp2_nonpositive(x: Expr, lanes: int) -> Expr:
    """2^x of a float32 vector that is known to be at most 0, as in a softmax of scaled scores.

    Parameters
    ----------
    x : PrimExpr
        float32 with `lanes` lanes, at most 0 or NaN; evaluated once.
    lanes : int
        Lanes of `x`; 1 for a scalar.

    Returns
    -------
    PrimExpr
        Relative error at most 1e-7; 0 below -126.
    """
    low = _float(-126.0, lanes)

    def of(x: Expr) -> Expr:
        return tirx.Select(x < low, _float(0.0, lanes), _power_of_two(x, lanes))

    return _let(x, of, _dtype("float32", lanes))


def _with_sign_of(magnitude: Expr, x: Expr, lanes: int) -> Expr:
    kind, whole = _dtype("float32", lanes), _dtype("int32", lanes)
    sign = tirx.bitwise_and(tirx.reinterpret(whole, x), _int(-(2**31), lanes))
    return tirx.reinterpret(kind, tirx.bitwise_or(tirx.reinterpret(whole, magnitude), sign))


def _magnitude(x: Expr, lanes: int) -> Expr:
    bits = tirx.bitwise_and(tirx.reinterpret(_dtype("int32", lanes), x), _int(0x7FFFFFFF, lanes))
    return tirx.reinterpret(_dtype("float32", lanes), bits)


def erf(x: Expr, lanes: int) -> Expr:
    """Error function of a float32 vector.

    Parameters
    ----------
    x : PrimExpr
        float32 with `lanes` lanes; evaluated once.
    lanes : int
        Lanes of `x`; 1 for a scalar.

    Returns
    -------
    PrimExpr
        Absolute error at most 1.2e-7, relative error at most 3e-7; exactly 1 or -1 from |x| = 4 on.
    """
    kind = _dtype("float32", lanes)

    def of_magnitude(a: Expr, x: Expr) -> Expr:
        small = _let(a * a, lambda t: a * _polynomial(_ERF_SMALL, t, lanes) + a, kind)
        clamped = tirx.Min(_float(4.0, lanes), a)
        large = _let(
            clamped,
            lambda c: _float(1.0, lanes) - _exp_of(c * _polynomial(_ERF_LARGE, c, lanes), lanes),
            kind,
        )
        chosen = tirx.Select(a < _float(1.0, lanes), small, large)
        return _with_sign_of(chosen, x, lanes)

    return _let(x, lambda x: _let(_magnitude(x, lanes), lambda a: of_magnitude(a, x), kind), kind)


def _exp_of(x: Expr, lanes: int) -> Expr:
    """Exp of an expression that lies within -80 and 80, or is NaN."""
    return _let(
        x,
        lambda x: _exp(x, lanes, lambda p, n: p * _exponent_bits(n, lanes)),
        _dtype("float32", lanes),
    )


def tanh(x: Expr, lanes: int) -> Expr:
    """Hyperbolic tangent of a float32 vector.

    Parameters
    ----------
    x : PrimExpr
        float32 with `lanes` lanes; evaluated once.
    lanes : int
        Lanes of `x`; 1 for a scalar.

    Returns
    -------
    PrimExpr
        Absolute error at most 1.5e-7, relative error at most 4e-7; exactly 1 or -1 from
        |x| = 10 on.
    """
    kind = _dtype("float32", lanes)

    def of_magnitude(a: Expr, x: Expr) -> Expr:
        small = _let(a * a, lambda t: a * (t * _polynomial(_TANH_SMALL, t, lanes)) + a, kind)
        clamped = tirx.Min(_float(10.0, lanes), a)
        grown = _exp_of(clamped + clamped, lanes)
        large = _float(1.0, lanes) - _float(2.0, lanes) / (grown + _float(1.0, lanes))
        return _with_sign_of(tirx.Select(a < _float(0.625, lanes), small, large), x, lanes)

    return _let(x, lambda x: _let(_magnitude(x, lanes), lambda a: of_magnitude(a, x), kind), kind)


def sigmoid(x: Expr, lanes: int) -> Expr:
    """Logistic function 1 / (1 + exp(-x)) of a float32 vector.

    Parameters
    ----------
    x : PrimExpr
        float32 with `lanes` lanes; evaluated once.
    lanes : int
        Lanes of `x`; 1 for a scalar.

    Returns
    -------
    PrimExpr
        Relative error at most 4e-7 from x = -87 on; 0 below about -89.
    """
    one = _float(1.0, lanes)
    return one / (one + exp(_float(0.0, lanes) - x, lanes))


def silu(x: Expr, lanes: int) -> Expr:
    """X * sigmoid(x) of a float32 vector, also called swish.

    Parameters
    ----------
    x : PrimExpr
        float32 with `lanes` lanes; evaluated once.
    lanes : int
        Lanes of `x`; 1 for a scalar.

    Returns
    -------
    PrimExpr
        Relative error at most 5e-7 from x = -87 on, 0 far below; NaN for -inf, as the formula
        has it.
    """
    one = _float(1.0, lanes)
    return _let(
        x,
        lambda x: x / (one + exp(_float(0.0, lanes) - x, lanes)),
        _dtype("float32", lanes),
    )


def gelu(x: Expr, lanes: int) -> Expr:
    """0.5 x (1 + erf(x / sqrt(2))) of a float32 vector.

    Parameters
    ----------
    x : PrimExpr
        float32 with `lanes` lanes; evaluated once.
    lanes : int
        Lanes of `x`; 1 for a scalar.

    Returns
    -------
    PrimExpr
        Absolute error at most 2e-7 * max(1, |x|): less than erf would need, whose error is
        relative where x is small.
    """
    kind = _dtype("float32", lanes)

    def of(x: Expr, a: Expr) -> Expr:
        clamped = tirx.Min(_float(_TAIL_END, lanes), a)
        exponent = _let(
            clamped, lambda c: c * _polynomial(_TAIL, c, lanes) - _float(1.0, lanes), kind
        )
        tail = tirx.Select(
            a < _float(_TAIL_END, lanes),
            _let(exponent, lambda y: _power_of_two(y, lanes), kind),
            _float(0.0, lanes),
        )
        return _let(
            tail,
            lambda t: x * tirx.Select(x < _float(0.0, lanes), t, _float(1.0, lanes) - t),
            kind,
        )

    return _let(x, lambda x: _let(_magnitude(x, lanes), lambda a: of(x, a), kind), kind)


def gelu_tanh(x: Expr, lanes: int) -> Expr:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) of a float32 vector.

    Parameters
    ----------
    x : PrimExpr
        float32 with `lanes` lanes; evaluated once.
    lanes : int
        Lanes of `x`; 1 for a scalar.

    Returns
    -------
    PrimExpr
        Absolute error at most 3e-7 * max(1, |x|).
    """

    # 0.5 (1 + tanh(u)) is the logistic function of 2 u.
    def of(x: Expr) -> Expr:
        cubic = x * x * _float(0.044715 * 1.5957691216057308, lanes)
        return silu_of(x, x * (cubic + _float(1.5957691216057308, lanes)))

    def silu_of(x: Expr, argument: Expr) -> Expr:
        one = _float(1.0, lanes)
        return x / (one + exp(_float(0.0, lanes) - argument, lanes))

    return _let(x, of, _dtype("float32", lanes))


def power_of_quarters(x: Expr, quarters: int, lanes: int) -> Expr:
    """X ** (quarters / 4) of a float32 vector, by square roots and products.

    Parameters
    ----------
    x : PrimExpr
        float32 with `lanes` lanes; evaluated once.
    quarters : int
        Four times the exponent, not 0.
    lanes : int
        Lanes of `x`; 1 for a scalar.

    Returns
    -------
    PrimExpr
        Relative error at most 6e-8 * (|quarters| + 3) where no power on the way over- or
        underflows; NaN for negative `x` unless the exponent is a whole number.
    """
    kind = _dtype("float32", lanes)
    # Root of the exponent's denominator: x, sqrt(x) or sqrt(sqrt(x)).
    roots = 0 if quarters % 4 == 0 else 1 if quarters % 2 == 0 else 2
    times = abs(quarters) >> (2 - roots)

    def raised(root: Expr) -> Expr:
        result = root
        for bit in bin(times)[3:]:
            result = _let(result, lambda r: r * r, kind)
            result = result * root if bit == "1" else result
        return result if quarters > 0 else _float(1.0, lanes) / result

    for _ in range(roots):
        x = tirx.sqrt(x)
    return _let(x, raised, kind)


# Every function above by the name that passes and epilogues use.
FUNCTIONS: dict[str, VectorFunction] = {
    "exp": exp,
    "erf": erf,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}
