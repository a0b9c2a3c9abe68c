"""The planner: sparse where zeros pay, words for every refusal, plans that survive editing."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tvm_sparse.schedules.lookup import stock_dense, template_named
from tvm_sparse.schedules.x86.templates import TEMPLATES

from tvm_sparse.errors import PlanError
from tvm_sparse.ops import WeightSite
from tvm_sparse.planner import Candidate, Decision, Plan, check_config, decide
from tvm_sparse.profile import profile_weight
from tvm_sparse.targets import X86Machine, machine_of, resolve_target
from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

AVX512 = X86Machine("x86-64-v4", 16, 32)
AVX2 = X86Machine("x86-64-v3", 8, 16)
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)

SHAPES = {
    "bert-projection": MatmulGeometry(768, 768, 128),
    "bert-output": MatmulGeometry(768, 3072, 128),
    "one-token": MatmulGeometry(1024, 784, 1),
    "symbolic-tokens": MatmulGeometry(512, 512, None),
    "primes": MatmulGeometry(97, 211, 61),
    "3x3": Conv2dGeometry(1, 128, 28, 28, 128, (3, 3), padding=(1, 1, 1, 1)),
    "1x1": Conv2dGeometry(1, 256, 14, 14, 256, (1, 1)),
    "7x7-stem": Conv2dGeometry(1, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3, 3, 3)),
}


def site(geometry, name="layer", refusal=""):
    op = "conv2d" if isinstance(geometry, Conv2dGeometry) else "matmul"
    return WeightSite(name, "w", "y", Workload(op, geometry), geometry.weight_shape, refusal)


def profile(geometry, density, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(geometry.weight_shape, np.float32)
    return profile_weight(weight * (rng.random(weight.shape) < density))


def decided(geometry, density, machine=AVX512, **options):
    return decide(site(geometry), profile(geometry, density), machine, **options)


@pytest.mark.parametrize("machine", [AVX512, AVX2], ids=["avx512", "avx2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_sparse_at_a_density_is_sparse_at_every_lower_one(shape, machine):
    sparse = [decided(SHAPES[shape], density, machine).is_sparse for density in DENSITIES]
    assert sparse == sorted(sparse, reverse=True), dict(zip(DENSITIES, sparse, strict=True))


@pytest.mark.parametrize("machine", [AVX512, AVX2], ids=["avx512", "avx2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_full_weight_stays_dense_and_says_that_it_has_no_zeros(shape, machine):
    decision = decided(SHAPES[shape], 1.0, machine)
    assert not decision.is_sparse
    assert decision.reason == "the weight has no zeros"


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - {"7x7-stem"}))
def test_two_percent_of_nonzeros_pay_everywhere(shape):
    decision = decided(SHAPES[shape], 0.02)
    assert decision.is_sparse
    assert decision.reason.startswith("expected ")
    assert decision.expected_us < decision.dense_us


@pytest.mark.parametrize("shape", ["bert-projection", "3x3", "1x1"])
def test_a_tenth_of_zeros_does_not_pay_and_the_reason_has_the_share_and_both_times(shape):
    decision = decided(SHAPES[shape], 0.9)
    assert not decision.is_sparse
    assert "10 % zeros do not pay here" in decision.reason
    assert "us sparse" in decision.reason and "us dense" in decision.reason


def test_candidates_are_listed_the_fastest_first_and_the_fastest_is_taken():
    decision = decided(SHAPES["bert-projection"], 0.1)
    times = [candidate.expected_us for candidate in decision.candidates]
    assert times == sorted(times)
    assert {"dense", "register_tiled"} <= {candidate.format for candidate in decision.candidates}
    assert decision.kernel == decision.candidates[0].kernel
    assert decision.source == "model"


def test_one_token_may_read_the_weight_by_vectors_of_features():
    decision = decided(SHAPES["one-token"], 1.0)
    assert decision.kernel == "gemv"


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        (Conv2dGeometry(1, 32, 14, 14, 32, (3, 3), padding=(1, 1, 1, 1), groups=32), "depthwise"),
        (Conv2dGeometry(1, 32, 14, 14, 32, (3, 3), groups=4), "4 groups"),
    ],
)
def test_what_has_no_sparse_kernel_stays_dense_and_says_why(geometry, words):
    decision = decided(geometry, 0.05)
    assert not decision.is_sparse
    assert words in decision.reason
    assert decision.kernel != "tvm"
    with pytest.raises(PlanError, match=f"'layer' cannot be register_tiled: .*{words}"):
        decided(geometry, 0.05, force={"layer": "register_tiled"})


def test_a_refusal_of_the_operator_reaches_the_decision():
    why = "the weight is float16; kernels exist for float32 only"
    refused = site(SHAPES["1x1"], refusal=why)
    decision = decide(refused, profile(SHAPES["1x1"], 0.1), AVX512)
    assert (decision.format, decision.kernel, decision.reason) == ("dense", "tvm", why)
    with pytest.raises(PlanError, match="float32 only"):
        decide(refused, profile(SHAPES["1x1"], 0.1), AVX512, force={"*": "register_tiled"})
    forced = decide(refused, profile(SHAPES["1x1"], 0.1), AVX512, force={"*": "dense"})
    assert forced.kernel == "tvm"


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_every_format_of_a_kernel_that_fits_can_be_forced(template):
    if not template.supports(WORKLOAD, AVX512) or not template.space(WORKLOAD, AVX512):
        pytest.skip("the kernel does not take this layer, or needs a record")
    decision = decided(SHAPES["primes"], 0.5, force={"*": template.format})
    assert decision.format == template.format


@pytest.mark.parametrize("pattern", ["layer", "l*", "lay??", "[kl]ayer"])
def test_force_and_forbid_take_names_and_patterns(pattern):
    geometry = SHAPES["bert-projection"]
    forced = decided(geometry, 1.0, force={pattern: "register_tiled"})
    assert forced.is_sparse
    assert (forced.source, forced.reason) == ("user", "forced to register_tiled")
    forbidden = decided(geometry, 0.05, forbid=[pattern])
    assert not forbidden.is_sparse
    assert (forbidden.source, forbidden.reason) == ("user", "kept dense by the user")
    assert not decided(geometry, 0.05, force={pattern: "dense"}).is_sparse


def test_a_name_with_brackets_is_a_name_first():
    geometry = SHAPES["primes"]
    named = replace(site(geometry), name="blocks[0].fc")
    decision = decide(named, profile(geometry, 0.05), AVX512, forbid=["blocks[0].fc"])
    assert decision.source == "user"


def test_a_pattern_for_another_layer_changes_nothing():
    geometry = SHAPES["bert-projection"]
    free = decided(geometry, 0.05)
    assert decided(geometry, 0.05, force={"other": "dense"}, forbid=["oth*"]) == free


def test_a_format_that_is_not_there_is_refused():
    with pytest.raises(PlanError, match="'layer' cannot be csr: there is no format 'csr'"):
        decided(SHAPES["primes"], 0.1, force={"*": "csr"})


def example(**changes):
    decision = decided(SHAPES["primes"], 0.05, force={"*": "register_tiled"})
    decision = replace(decision, name="fc", **changes)
    return Plan({"kind": "llvm", "mcpu": "x86-64-v3"}, 1, "0123456789abcdef", (decision,))


def test_a_plan_goes_to_json_and_comes_back_equal(tmp_path):
    plan = example()
    assert Plan.from_json(plan.to_json()) == plan
    place = tmp_path / "plan.json"
    plan.to_json(place)
    assert Plan.from_json(place) == Plan.from_json(str(place)) == plan
    assert list(tmp_path.iterdir()) == [place]


def test_a_plan_says_what_becomes_of_each_layer():
    text = str(example())
    assert text.startswith("plan: 1 of 1 layers sparse, 1 threads")
    assert "fc: register_tile (forced to register_tiled)" in text


def test_a_plan_finds_layers_by_name():
    plan = example()
    assert plan.decision("fc") is plan.decisions[0]
    with pytest.raises(PlanError, match="no layer 'fc2'; it was made for another model"):
        plan.decision("fc2")


def broken(change):
    data = json.loads(example().to_json())
    change(data, data["decisions"][0])
    return json.dumps(data)


BROKEN = {
    "another version": (lambda plan, layer: plan.update(version=99), "version 99"),
    "no version": (lambda plan, layer: plan.pop("version"), "version None"),
    "no decisions": (lambda plan, layer: plan.pop("decisions"), "misspells a field.*decisions"),
    "no digest": (lambda plan, layer: plan.pop("digest"), "misspells a field.*digest"),
    "decisions are null": (lambda plan, layer: plan.update(decisions=None), "misspells a field"),
    "decisions are text": (lambda plan, layer: plan.update(decisions="ab"), "misspells a field"),
    "a decision is a number": (lambda plan, layer: plan.update(decisions=[3]), "misspells a field"),
    "the target is a number": (lambda plan, layer: plan.update(target=3), "misspells a field"),
    "threads are words": (lambda plan, layer: plan.update(threads="two"), "misspells a field"),
    "no threads at all": (lambda plan, layer: plan.update(threads=0), "0 threads"),
    "a layer without kernel": (lambda plan, layer: layer.pop("kernel"), "kernel"),
    "a layer without name": (lambda plan, layer: layer.pop("name"), "name"),
    "a field too many": (lambda plan, layer: layer.update(kernal="x"), "kernal"),
    "a kernel that is not there": (
        lambda plan, layer: layer.update(kernel="magic"),
        "no kernel is called 'magic'; there are register_tile, .*dense_panels",
    ),
    "a kernel of another format": (
        lambda plan, layer: layer.update(format="dense"),
        "'fc': kernel 'register_tile' reads the format 'register_tiled', not 'dense'",
    ),
    "a configuration that is a list": (
        lambda plan, layer: layer.update(config=[1]),
        "layer 'fc' of the plan .* a list is no value of the field 'config'",
    ),
    "a name that is a number": (
        lambda plan, layer: layer.update(name=3),
        "3 is no value of the field 'name'",
    ),
    "a kernel that is a list": (
        lambda plan, layer: layer.update(kernel=[]),
        "no value of the field 'kernel'",
    ),
    "a time in words": (
        lambda plan, layer: layer.update(expected_us="fast"),
        "\"fast\" is no value of the field 'expected_us'",
    ),
    "candidates are null": (lambda plan, layer: layer.update(candidates=None), "misspells a field"),
    "the same layer twice": (
        lambda plan, layer: plan["decisions"].append(layer),
        "decides twice about the layer 'fc'",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_plan_is_refused_in_a_sentence(what):
    change, words = BROKEN[what]
    with pytest.raises(PlanError, match=words) as refusal:
        Plan.from_json(broken(change))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{not json", "not valid JSON"), ("{}", "version None"), ("no/such/file", "cannot be read")],
)
def test_what_is_no_plan_is_refused_in_a_sentence(text, words):
    with pytest.raises(PlanError, match=words):
        Plan.from_json(text)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1, 2]", b"", b"plan"])
def test_a_file_that_is_no_plan_is_refused_in_a_sentence(content, tmp_path):
    place = tmp_path / "plan.json"
    place.write_bytes(content)
    with pytest.raises(PlanError, match="the plan"):
        Plan.from_json(place)


def test_a_plan_that_cannot_be_written_says_where(tmp_path):
    with pytest.raises(PlanError, match=r"cannot be written to '.*nowhere"):
        example().to_json(tmp_path / "nowhere" / "plan.json")


WORKLOAD = Workload("matmul", SHAPES["primes"])


def config_of(kernel, **changes):
    config = dict(template_named(kernel).space(WORKLOAD, AVX512)[0], **changes)
    return {key: value for key, value in config.items() if value != "absent"}


@pytest.mark.parametrize("kernel", ["register_tile", "dense_panels"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mr": 0}, "a number from 1 to 65535 as 'mr', not 0"),
        ({"mr": "x"}, "as 'mr', not x"),
        ({"mr": None}, "as 'mr', not None"),
        ({"mr": True}, "as 'mr', not True"),
        ({"nt": 0}, "as 'nt', not 0"),
        ({"nt": 1.5}, "as 'nt', not 1.5"),
        ({"kb": -3}, "as 'kb', not -3"),
        ({"kb": [16]}, "as 'kb'"),
        ({"kb": 10**9}, "as 'kb', not 1000000000"),
        ({"kb": 33}, "a multiple of 16 .the vector width. as 'kb', or at least all 211 columns"),
        ({"threads": 0}, "as 'threads', not 0"),
        ({"parts": 0}, "as 'parts', not 0"),
        ({"kb": "absent"}, "lacks 'kb'; it needs mr, nt, kb"),
        ({"threads": "absent"}, "lacks 'threads'"),
        ({"unroll": 4}, "has no 'unroll'"),
        ({"mr": 8, "nt": 1000}, "8 x 1000 vectors"),
    ],
)
def test_a_configuration_that_makes_no_kernel_is_refused_in_a_sentence(kernel, changes, words):
    config = config_of(kernel, **changes)
    with pytest.raises(PlanError, match=f"'fc': the configuration of '{kernel}' .*{words}"):
        check_config("fc", template_named(kernel), WORKLOAD, AVX512, config)


@pytest.mark.parametrize(
    ("changes", "words"), [({"mr": 24}, "multiple of 16"), ({"pixels": 90}, "90 x 2 vectors")]
)
def test_panels_of_channels_are_whole_vectors_and_their_tiles_sensible(changes, words):
    kernel = "channel_vectors"
    config = {**config_of(kernel), "mr": 32, **changes}
    with pytest.raises(PlanError, match=words):
        check_config("fc", template_named(kernel), WORKLOAD, AVX512, config)


def test_what_follows_from_the_layer_cannot_be_chosen():
    with pytest.raises(PlanError, match="has to have 1 as 'groups' here, not 3"):
        config = config_of("dense_panels", groups=3)
        check_config("fc", template_named("dense_panels"), WORKLOAD, AVX512, config)
    few = Workload("matmul", MatmulGeometry(20, 30, 2))
    with pytest.raises(PlanError, match="has to have 16 as 'mr' here, not 4"):
        config = {"mr": 4, "groups": 1, "threads": 1}
        check_config("fc", template_named("gemv"), few, AVX512, config)


@pytest.mark.parametrize("machine", [AVX512, AVX2], ids=["avx512", "avx2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_configuration_that_the_planner_may_choose_is_accepted(shape, machine):
    workload = replace(site(SHAPES[shape]).workload, threads=2)
    for template in TEMPLATES:
        if template.supports(workload, machine):
            for config in template.space(workload, machine):
                check_config("fc", template, workload, machine, config)


def test_decisions_are_plain_data():
    candidate = Candidate("dense", "gemv", {"mr": 16}, 3.0)
    decision = Decision("fc", "matmul", "dense", "gemv", {"mr": 16}, "model", "r", 3.0, 3.0)
    assert json.loads(Plan({}, 1, "d", (replace(decision, candidates=(candidate,)),)).to_json())


@pytest.mark.parametrize("tokens", [1, 3, 7, 16, None])
@pytest.mark.parametrize("machine", [AVX2, AVX512], ids=["avx2", "avx512"])
def test_configurations_of_very_long_rows_are_accepted(tokens, machine):
    workload = Workload("matmul", MatmulGeometry(40, 25088, tokens), threads=2)
    for template in TEMPLATES:
        if template.supports(workload, machine):
            for config in template.space(workload, machine):
                check_config("layer", template, workload, machine, config)


def test_a_template_says_which_types_it_is_for():
    workload = replace(WORKLOAD, dtype="float16")
    for template in TEMPLATES:
        match = template.takes(workload, AVX512)
        assert not match
        assert match.reason == "the weight is float16; its kernels are for float32"
        assert bool(template.takes(WORKLOAD, AVX512)) == bool(template.supports(WORKLOAD, AVX512))
    both = replace(TEMPLATES[0], dtypes=frozenset({"float16", "bfloat16"}))
    assert both.takes(workload, AVX512).ok == TEMPLATES[0].supports(WORKLOAD, AVX512).ok
    reason = both.takes(WORKLOAD, AVX512).reason
    assert reason == "the weight is float32; its kernels are for bfloat16 and float16"


def test_tvm_s_own_float16_products_are_expected_to_use_tensor_cores():
    machine = machine_of(resolve_target("cuda-sm80"))
    times = {
        dtype: stock_dense(Workload("matmul", MatmulGeometry(4096, 4096, 4096), dtype), machine)
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert times["float32"] == times["bfloat16"] > 5 * times["float16"]
