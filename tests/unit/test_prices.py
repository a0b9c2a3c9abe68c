"""Prices of the cost model: found again, held to what is known, judged on what they did not see."""

from dataclasses import replace

import numpy as np
import pytest
from tvm_sparse.schedules.lookup import template_named
from tvm_sparse.schedules.x86 import cost
from tvm_sparse.schedules.x86.cost import PRICE_NAMES, prices_of

from tvm_sparse.profile import profile_weight
from tvm_sparse.targets import X86Machine
from tvm_sparse.tuning import prices as prices_module
from tvm_sparse.tuning.prices import (
    FLOORS,
    Sample,
    errors_of,
    estimate,
    events_of,
    fit_prices,
    leave_one_group_out,
)
from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

MACHINE = X86Machine(mcpu="znver4", lanes=16, registers=32, fma_per_cycle=1, gigahertz=3.0)

# Twice or half of what the table says, where kernels spend their time.
OTHER = {"lone_fma": 2.2, "dense_fma": 2.2, "spread": 1.6, "surprise": 30.0, "pack": 6.0}

WORKLOADS = [
    Workload("matmul", MatmulGeometry(256, 192, 128)),
    Workload("matmul", MatmulGeometry(64, 512, 512)),
    Workload("matmul", MatmulGeometry(512, 128, 32)),
    Workload("matmul", MatmulGeometry(128, 128, 16)),
    Workload("conv2d", Conv2dGeometry(1, 32, 28, 28, 64, (3, 3), padding=(1, 1, 1, 1))),
    Workload("conv2d", Conv2dGeometry(1, 128, 14, 14, 64, (1, 1))),
]


def matrix(shape, density):
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape).astype(np.float32) * (rng.random(shape) < density)


def samples(true, noise=0.0, workloads=WORKLOADS):
    """Kernels whose times are what `true` prices make of them."""
    rng = np.random.default_rng(1)
    found = []
    for workload in workloads:
        for density in (0.5, 0.1, 0.02):
            profile = profile_weight(matrix(workload.geometry.weight_shape, density))
            for name in ("register_tile", "sliced_rows", "dense_panels"):
                template = template_named(name)
                for config in template.space(workload, MACHINE)[:3]:
                    events = events_of(name, workload, MACHINE, profile, config)
                    own = Sample(name, workload, events, 1.0, repr(workload.geometry), density)
                    if own.is_dense:
                        own = replace(own, density=1.0)
                    us = estimate(own, true) * (1 + noise * rng.standard_normal())
                    found.append(replace(own, microseconds=us))
    return found


def priced(**prices):
    return replace(MACHINE, prices=tuple(prices.items()))


def test_prices_that_times_were_made_from_are_found_again():
    found = fit_prices(samples(priced(**OTHER)), MACHINE)
    for name in ("lone_fma", "dense_fma"):
        assert found[name] == pytest.approx(OTHER[name], rel=0.15)
    refitted = replace(MACHINE, prices=tuple(found.items()))
    unseen = samples(priced(**OTHER), workloads=[Workload("matmul", MatmulGeometry(384, 320, 64))])
    off = errors_of(unseen, [estimate(sample, refitted) for sample in unseen])
    assert off.median < 0.05


def test_some_disturbed_measurements_do_not_matter():
    own = samples(priced(**OTHER), noise=0.02)
    disturbed = [
        replace(sample, microseconds=sample.microseconds * (1.8 if index % 8 == 0 else 1))
        for index, sample in enumerate(own)
    ]
    refitted = replace(MACHINE, prices=tuple(fit_prices(disturbed, MACHINE).items()))
    assert errors_of(own, [estimate(sample, refitted) for sample in own]).median < 0.06


def test_without_samples_the_prices_stay():
    found = fit_prices([], MACHINE)
    table = prices_of(MACHINE)
    assert set(found) == set(PRICE_NAMES)
    for name in PRICE_NAMES:
        start = max(getattr(table, name), FLOORS.get(name, 0.1))
        assert found[name] == pytest.approx(start, rel=1e-3), name


def test_few_samples_change_only_what_they_speak_of():
    one = [sample for sample in samples(priced(**OTHER)) if sample.template == "dense_panels"][:1]
    found, table = fit_prices(one, MACHINE), prices_of(MACHINE)
    assert found["dense_fma"] > 1.3 * table.dense_fma
    for name in ("fma", "lone_fma", "scalar", "surprise"):
        assert found[name] == pytest.approx(getattr(table, name), rel=0.02)


def test_prices_keep_to_their_bounds():
    absurd = [replace(sample, microseconds=1e-3) for sample in samples(MACHINE)]
    found = fit_prices(absurd, MACHINE)
    assert all(found[name] >= FLOORS.get(name, 0.1) * 0.999 for name in PRICE_NAMES)
    slow = [replace(sample, microseconds=1e9) for sample in samples(MACHINE)]
    table = prices_of(MACHINE)
    for name, price in fit_prices(slow, MACHINE).items():
        assert price <= 20.001 * max(getattr(table, name), FLOORS.get(name, 0.1))


def test_the_left_out_shape_is_not_fitted_to(monkeypatch):
    seen = []

    def spy(fitted, machine):
        seen.append({sample.group for sample in fitted})
        return {name: getattr(prices_of(machine), name) for name in PRICE_NAMES}

    monkeypatch.setattr(prices_module, "fit_prices", spy)
    own = samples(MACHINE)
    groups = list(dict.fromkeys(sample.group for sample in own))
    leave_one_group_out(own, MACHINE)
    assert seen == [set(groups) - {group} for group in groups]


def test_a_shape_unlike_the_others_is_off():
    own = samples(MACHINE)
    odd = own[0].group
    own = [
        replace(sample, microseconds=sample.microseconds * (3 if sample.group == odd else 1))
        for sample in own
    ]
    errors = leave_one_group_out(own, MACHINE)
    off = {sample.group: abs(rel) for sample, rel in zip(errors.samples, errors.relative)}  # noqa: B905
    assert off[odd] > 0.5
    assert errors.median < 0.1


def test_the_best_kernel_is_the_one_that_is_expected_to_be():
    workload = WORKLOADS[0]

    def sample(name, us, density):
        return Sample(name, workload, {}, us, "shape", density)

    own = [
        sample("register_tile", 10.0, 0.1),
        sample("sliced_rows", 8.0, 0.1),
        sample("dense_panels", 40.0, 1.0),
        sample("register_tile", 50.0, 0.5),
    ]
    errors = errors_of(own, [9.0, 12.0, 44.0, 60.0])
    # At 0.5 dense competes, and is expected to be the fastest.
    assert errors.best == pytest.approx(
        {("shape", 0.1): 9 / 8 - 1, ("shape", 1.0): 0.1, ("shape", 0.5): 0.1}
    )
    assert errors.median == pytest.approx((0.1 + 0.2) / 2)
    assert errors.by_template()["dense_panels"] == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["register_tile", "sliced_rows", "dense_panels"])
def test_a_template_estimates_what_its_events_cost(name):
    workload, template = WORKLOADS[0], template_named(name)
    profile = profile_weight(matrix(workload.geometry.weight_shape, 0.1))
    config = template.space(workload, MACHINE)[0]
    events = events_of(name, workload, MACHINE, profile, config)
    assert set(events) <= set(PRICE_NAMES)
    expected = cost.cycles(events, MACHINE) / (MACHINE.gigahertz * 1e3)
    assert template.estimate(workload, MACHINE, profile, config) == pytest.approx(expected)


def test_a_machine_has_its_own_prices():
    workload, template = WORKLOADS[0], template_named("dense_panels")
    profile = profile_weight(matrix(workload.geometry.weight_shape, 1.0))
    config = template.space(workload, MACHINE)[0]
    slow = priced(dense_fma=10 * prices_of(MACHINE).dense_fma)
    assert template.estimate(workload, slow, profile, config) > 5 * template.estimate(
        workload, MACHINE, profile, config
    )
    assert hash(slow) != hash(MACHINE)


@pytest.mark.parametrize("density", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("block", [1, 4])
def test_the_mask_kernel_is_expected_to_touch_what_it_touches(density, block):
    from tvm_sparse.formats import FORMATS

    rng = np.random.default_rng(2)
    kept = np.repeat(rng.random((512 // block, 384)) < density, block, axis=0)
    weight = np.where(kept, np.float32(1), np.float32(0))
    workload = Workload("matmul", MatmulGeometry(512, 384, 64))
    for config in template_named("register_tile").space(workload, MACHINE)[:4]:
        if config["mr"] != 4:
            continue
        events = events_of("register_tile", workload, MACHINE, profile_weight(weight), config)
        packed = FORMATS["register_tiled"].pack(weight, config)
        touched = events["column"] / (64 // 16 // config["nt"])
        assert touched == pytest.approx(len(packed.arrays["columns"]), rel=0.12)
        loops = events["loop"] / (64 // 16 // config["nt"])
        counts = packed.arrays["counts"].reshape(-1, 16)[:, 1:]
        assert loops == pytest.approx(np.count_nonzero(counts), rel=0.4)
