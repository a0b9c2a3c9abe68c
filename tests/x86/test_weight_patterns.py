"""Every pattern of zeros, and NaN, Inf and extreme values where they can do harm.

What NaN and Inf do: a sparse kernel sums over the nonzeros of the weight alone, so that they reach
a result through a nonzero weight and never through a zero, stored or padded. A dense kernel
multiplies zeros too, one of panels over the columns that they need those of its panels, one of the
channels that are left theirs, and one of N slots in every M those of the slots that it fills up.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from dense_support import WIDTHS, features, machine
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_reference import EPILOGUES, operands
from panel_support import batch_of, build_kernel, check_kernel
from tvm_sparse.schedules.base import matrix_view
from tvm_sparse.schedules.lookup import DENSE_FORMATS, template_named
from tvm_sparse.schedules.x86.templates import TEMPLATES, block_step
from weight_patterns import PATTERNS

from tvm_sparse.check import compare, dot_bound
from tvm_sparse.epilogue_reference import evaluate64
from tvm_sparse.float64 import ConvAttributes, conv2d64
from tvm_sparse.formats import FORMATS
from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

LANES = [lanes for lanes, (_, feature) in WIDTHS.items() if feature in features()]
# MetaSchedule's kernels have no configuration without a record: `test_metaschedule.py` has them.
NAMES = [template.name for template in TEMPLATES if template.name != "metaschedule"]


def small_blocks(workload):
    """Several blocks of columns in weights that compile fast."""
    return {"kb": block_step(workload, 16) * 2}


BARE, BIAS = EPILOGUES["none"], EPILOGUES["bias"]
WORKLOADS = (
    Workload("matmul", MatmulGeometry(37, 61, 19), epilogue=BIAS),
    Workload("matmul", MatmulGeometry(50, 70, 66)),
    Workload("matmul", MatmulGeometry(33, 75, 3), epilogue=BIAS),
    Workload("matmul", MatmulGeometry(24, 80, 1)),
    Workload("conv2d", Conv2dGeometry(1, 5, 9, 9, 19, (3, 3), (2, 2))),
    Workload("conv2d", Conv2dGeometry(2, 40, 7, 7, 21, (1, 1)), epilogue=BIAS),
    Workload("conv2d", Conv2dGeometry(1, 12, 8, 17, 12, (3, 3), groups=12), epilogue=BIAS),
)
PADDED = (
    Workload("conv2d", Conv2dGeometry(1, 5, 7, 9, 18, (3, 3), padding=(1, 1, 1, 1))),
    Workload("conv2d", Conv2dGeometry(1, 4, 9, 8, 4, (3, 3), padding=(1,) * 4, groups=4)),
)


def workloads_of(name, choices):
    return st.sampled_from([w for w in choices if lanes_of(name, w)])


def lanes_of(name, workload):
    """List the vectors for which a template takes a workload."""
    supports = template_named(name).supports
    return [lanes for lanes in LANES if supports(workload, machine(lanes))]


def draw_weight(workload, pattern, density, rng):
    """Draw [k, m] or OIHW weights of a density and a pattern."""
    rows, columns = workload.geometry.weight_shape
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    weight *= rng.random((rows, columns)) < density
    return shaped(workload, PATTERNS[pattern](rng, weight))


def shaped(workload, matrix):
    """Lay [rows, columns] out as the operator stores it."""
    geometry = workload.geometry
    if workload.op == "matmul":
        return np.ascontiguousarray(matrix.T)
    inputs = geometry.in_channels // geometry.groups
    return matrix.reshape(-1, inputs, *geometry.kernel)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(data=st.data(), pattern=st.sampled_from(list(PATTERNS)), seed=st.integers(0, 99))
def test_every_pattern_agrees_with_float64(name, data, pattern, seed):
    workload = data.draw(workloads_of(name, WORKLOADS + PADDED))
    density = data.draw(st.sampled_from([0.02, 0.1, 0.4, 1.0]))
    lanes = data.draw(st.sampled_from(lanes_of(name, workload)))
    weight = draw_weight(workload, pattern, density, np.random.default_rng(seed))
    check_kernel(name, workload, weight, lanes, small_blocks(workload), seed=seed)


def accumulate64(workload, x, weight):
    """Multiply and sum up in float64, without the epilogue."""
    if workload.op == "matmul":
        return x.astype(np.float64) @ weight.astype(np.float64)
    g = workload.geometry
    return conv2d64(x, weight, ConvAttributes(g.strides, g.padding, g.dilation, g.groups))


def special_reference(workload, x, weight, channels, zeros):
    """Compute what NaN and Inf of x and the weight give, and the error bound of the rest.

    `zeros` marks the zeros of the weight that are multiplied.

    Sums of zeros and ones count the products of each kind: one NaN, or both infinities, give NaN.
    Only layers without padding have an answer that does not depend on whether padding multiplies,
    as soon as a weight is infinite or NaN.
    """
    assert np.isfinite(weight).all() or workload not in PADDED
    meets = lambda a, b: accumulate64(workload, a.astype(np.float32), b.astype(np.float32)) > 0  # noqa: E731
    plain_x, plain_weight = (np.where(np.isfinite(a), a, np.float32(0)) for a in (x, weight))
    acc = accumulate64(workload, plain_x, plain_weight)
    magnitude = accumulate64(workload, np.abs(plain_x), np.abs(plain_weight))

    inf = np.inf
    plus = meets(x == inf, weight > 0) | meets(x == -inf, weight < 0)
    plus |= meets(x > 0, weight == inf) | meets(x < 0, weight == -inf)
    minus = meets(x == inf, weight < 0) | meets(x == -inf, weight > 0)
    minus |= meets(x < 0, weight == inf) | meets(x > 0, weight == -inf)
    undefined = meets(~np.isfinite(x), zeros) | meets(np.isnan(x), weight != 0) | (plus & minus)
    undefined |= meets(np.ones_like(x), np.isnan(weight)) | meets(x == 0, np.isinf(weight))
    acc[plus], acc[minus], acc[undefined] = inf, -inf, np.nan

    terms = workload.geometry.weight_shape[1]
    shape = (-1,) if workload.op == "matmul" else (-1, 1, 1)
    vectors = [vector.reshape(shape) for vector in channels]
    return evaluate64(workload.epilogue, acc, dot_bound(magnitude, terms), vectors, [])


def multiplied_zeros(template, workload, weight, config):
    """Mark the zeros of a weight that a kernel multiplies."""
    if template.format in DENSE_FORMATS:
        return weight == 0
    if template.format not in ("gathered_panels", "compact_channels", "n_of_m"):
        return np.zeros_like(weight, bool)
    # Every element that is held counts as a nonzero of a weight of ones.
    packed = FORMATS[template.format].pack(matrix_view(weight, workload.op), config)
    ones = dict(packed.arrays, values=np.ones_like(packed.arrays["values"]))
    held = FORMATS[template.format].unpack(replace(packed, arrays=ones)) != 0
    return shaped(workload, held) & (weight == 0)


def check_special(name, workload, x, weight, lanes, channels):
    template = template_named(name)
    config = {**template.space(workload, machine(lanes))[0], **small_blocks(workload)}
    kernel = build_kernel(template, workload, weight, lanes, config)
    zeros = multiplied_zeros(template, workload, weight, config)
    want, bound = special_reference(workload, x, weight, channels, zeros)
    result = kernel.run(x, channels, (), want.shape)
    check = compare(name, result, want, bound)
    assert check.ok, check


SPECIALS = [np.nan, np.inf, -np.inf]


def strewn(rng, array, values, count):
    """Put values at random places of a copy."""
    array = array.copy()
    array.reshape(-1)[rng.integers(array.size, size=count)] = rng.choice(values, count)
    return array


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(
    data=st.data(),
    pattern=st.sampled_from(["as drawn", "empty rows", "empty columns", "negative zeros"]),
    count=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_nan_and_inf_in_activations_reach_only_what_they_must(name, data, pattern, count, seed):
    workload = data.draw(workloads_of(name, WORKLOADS + PADDED))
    lanes = data.draw(st.sampled_from(lanes_of(name, workload)))
    rng = np.random.default_rng(seed)
    weight = draw_weight(workload, pattern, 0.1, rng)
    x, channels, _, _ = operands(workload, batch_of(workload), seed)
    check_special(name, workload, strewn(rng, x, SPECIALS, count), weight, lanes, channels)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", SPECIALS)
def test_a_column_without_weights_may_hold_anything(name, value):
    for workload in (w for w in WORKLOADS if w.op == "matmul"):
        if not template_named(name).supports(workload, machine(LANES[0])):
            continue
        rng = np.random.default_rng(0)
        weight = draw_weight(workload, "empty columns", 0.2, rng)
        x, channels, _, _ = operands(workload, batch_of(workload), 0)
        x[:, ~weight.any(axis=1)] = value
        check_special(name, workload, x, weight, LANES[0], channels)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(
    data=st.data(),
    pattern=st.sampled_from(["as drawn", "one dense row", "blocks", "all zero"]),
    count=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_nan_and_inf_in_weights_reach_only_their_rows(name, data, pattern, count, seed):
    workload = data.draw(workloads_of(name, WORKLOADS))
    lanes = data.draw(st.sampled_from(lanes_of(name, workload)))
    rng = np.random.default_rng(seed)
    weight = strewn(rng, draw_weight(workload, pattern, 0.1, rng), SPECIALS, count)
    x, channels, _, _ = operands(workload, batch_of(workload), seed)
    check_special(name, workload, x, weight, lanes, channels)
