"""The benchmark of GPU kernels: its layers, its clock's arithmetic, its comparisons."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from benchmark_support import BENCHMARKS, importable_benchmarks  # noqa: F401

from tvm_sparse.cuda_toolkit import has_gpu
from tvm_sparse.errors import SparseError


class FakeClock:
    """Work takes what it says of itself."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def seconds(self, work):
        before = self.now
        work()
        return self.now - before

    def system(self, name, seconds, copies=3):
        def call(number):
            self.order.append((name, number))
            self.now += seconds

        return [lambda number=number: call(number) for number in range(copies)]


def small_matmul(form="unstructured", dtype="float32", zeros=0.8, m=64, k=64, n=32):
    from cuda_cases import Case

    from tvm_sparse.workload import MatmulGeometry

    return Case("unstructured", MatmulGeometry(m, k, n), dtype, form, zeros, "row_tiles")


def small_conv(kernel=3, stride=1):
    from cuda_cases import Case

    from tvm_sparse.workload import Conv2dGeometry

    pad = (kernel // 2,) * 4
    shape = Conv2dGeometry(2, 8, 9, 9, 16, (kernel, kernel), (stride, stride), pad)
    return Case("direct-test", shape, "float32", "unstructured", 0.8, "row_tiles")


def test_every_layer_of_the_table_is_well_formed():
    from cuda_build import model_of
    from cuda_cases import OVERHEAD, TABLE, Case

    assert len({case.name for case in TABLE}) == len(TABLE)
    for case in (*TABLE, OVERHEAD):
        assert Case.from_data(case.to_data()) == case
        assert case.format in {
            "tile_wise", "two_four", "tile_wise_two_four", "bitmap_tiles", "row_tiles"
        }  # fmt: skip
        on_cores = case.format == "row_tiles"
        assert case.dtype == "float32" if on_cores else case.dtype in ("float16", "float32")
        rows, columns = case.geometry.weight_shape
        assert rows > 0 and columns > 0 and case.columns > 0 and 0 < case.zeros < 1
        if case.op == "conv2d":
            assert case.shapes[1][2:] == (case.geometry.out_height, case.geometry.out_width)
    smallest = min(TABLE, key=lambda case: math.prod(case.geometry.weight_shape))
    graph = model_of(smallest, smallest.weight()).graph
    assert [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == list(
        smallest.shapes[0]
    )


def test_the_groups_are_those_that_were_asked_for():
    from cuda_cases import TABLE, matching
    from cuda_run import ASKED

    for asked in ASKED:
        fitting = [case for case in TABLE if case.name.startswith(asked.groups)]
        assert [case for case in fitting if asked.zeros in (None, case.zeros)], asked.title
    assert {case.geometry.n for case in matching("decode")} == {8, 16, 32, 64}
    assert [case.name for case in matching("block/16x1/4096*/9?")] == [
        "block/16x1/4096x4096x4096/90",
        "block/16x1/4096x4096x4096/95",
    ]


@pytest.mark.parametrize(
    ("form", "zeros"),
    [
        ("unstructured", 0.9),
        ("2:4", 0.5),
        ("64:2:8", 0.75),
        ("64:2:16", 0.875),
        ("block:32x32", 0.75),
        ("block:16x1", 0.8),
        ("tile-wise:32", 0.75),
    ],
)
def test_a_form_leaves_what_it_says(form, zeros):
    from cuda_cases import kept

    magnitude = np.abs(np.random.default_rng(0).standard_normal((128, 96), np.float32))
    marks = kept(magnitude, form, zeros)
    assert 1 - marks.mean() == pytest.approx(zeros, abs=0.02)
    if form == "2:4":
        assert (marks.reshape(128, 24, 4).sum(axis=2) == 2).all()
        assert magnitude[marks].mean() > magnitude[~marks].mean()
    if form.startswith("64:"):
        width = int(form.rpartition(":")[2])
        assert (marks.reshape(128, 96 // width, width).sum(axis=2) == 2).all()
        columns = marks.reshape(2, 64, 96 // width, width).any(axis=1)
        assert columns.sum(axis=2).max() == 4
    if form == "block:32x32":
        assert set(np.unique(marks.reshape(4, 32, 3, 32).mean(axis=(1, 3)))) <= {0.0, 1.0}
    if form == "tile-wise:32":
        rows = np.flatnonzero(marks.any(axis=1))
        assert len(rows) == 64
        for first in (0, 32):
            tile = marks[rows[first : first + 32]]
            assert (tile == tile[0]).all()


def test_an_unknown_form_is_refused():
    from cuda_cases import kept

    with pytest.raises(ValueError, match="no form of sparsity 'checkered'"):
        kept(np.ones((4, 4), np.float32), "checkered", 0.5)


def test_systems_are_timed_in_turn_and_long_enough():
    from cuda_timing import SHORTEST_SAMPLE, interleaved, turns_for

    clock = FakeClock()
    systems = {"ours": clock.system("ours", 1e-4), "peer": clock.system("peer", 3e-4)}
    assert turns_for(systems["ours"], clock) * 3 * 1e-4 >= SHORTEST_SAMPLE
    clock.order.clear()
    found = interleaved(systems, clock, rounds=5)
    assert found["ours"].median == pytest.approx(100)
    assert found["peer"].median == pytest.approx(300)
    # Buffers rotate within a system.
    mine = [number for name, number in clock.order if name == "ours"]
    assert mine[:6] == [0, 1, 2, 0, 1, 2]
    blocks = [name for i, (name, _) in enumerate(clock.order) if clock.order[i - 1][0] != name]
    assert {"ours", "peer"} == set(blocks) and len(blocks) >= 5


def test_buffers_in_rotation_are_larger_than_the_cache():
    from cuda_timing import rotation_for

    assert rotation_for(10 << 20, 50 << 20) * 10 >= 150
    assert rotation_for(1 << 30, 50 << 20) == 2
    assert rotation_for(1, 50 << 20) == 64


def test_a_peer_s_fastest_way_counts():
    from cuda_peers import Way
    from cuda_run import fastest_way, over
    from timing import Spread

    clock = FakeClock()
    ways = [Way(n, clock.system(n, t), lambda y: y) for n, t in (("slow", 2e-3), ("fast", 1e-3))]
    assert fastest_way(ways, clock).name == "fast"
    assert over(Spread(30.0, 29.0, 31.0), "fast", 10.0)["over_ours"] == 3.0


def measured(name, zeros, **over):
    peers = {peer: {"over_ours": ratio} for peer, ratio in over.items()}
    return {"name": name, "zeros": zeros, "peers": peers}


def test_what_was_asked_for_stands_beside_what_was_found():
    from cuda_run import ASKED

    line = ASKED[0].line(
        [
            measured("tile-wise/a/75", 0.75, cublas=1.9),
            measured("tile-wise/b/75", 0.75, cublas=2.2),
            measured("2:4/4096x4096x4096/50", 0.5, cublas=9.0),
        ]
    )
    assert line.startswith("met") and "2.04x" in line and "1 of 2 layers" in line
    assert ASKED[0].line([measured("tile-wise/a/75", 0.75, cublas=1.2)]).startswith("MISSED")
    assert ASKED[0].line([]).startswith("not measured")


def test_ceilings_are_those_of_memory_and_of_the_units():
    from cuda_run import ceilings

    machine = {
        "multiprocessors": 100, "cores": 128, "tensor_macs": 2048,
        "gigahertz": 1.0, "memory_gbytes": 1000.0,
    }  # fmt: skip
    case = small_matmul(m=1000, k=1000, n=1000)
    limits = ceilings(case, nnz=128_000, packed_bytes=2_000_000, machine=machine)
    assert limits == {"bytes_us": 10.0, "flops_us": 10.0, "binds": "flops"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["matmul", "conv"])
def test_a_result_is_held_against_float64_before_it_counts(dtype, kind):
    from cuda_run import Reference

    case = small_matmul(dtype=dtype) if kind == "matmul" else small_conv()
    weight = case.weight()
    reference = Reference(case, weight)
    right = reference.cuts[1][2] if len(reference.inputs) == len(case.input()) else None
    assert right is not None and right.shape == case.shapes[1]
    assert reference.check("layer", right.astype(case.dtype)).ok
    wrong = right.copy()
    wrong[0, 1] += 0.05
    assert not reference.check("layer", wrong.astype(case.dtype)).ok
    assert reference.distance(right) == 0


def test_a_weight_is_drawn_again_or_refused(tmp_path):
    from cuda_build import digest
    from cuda_run import weight_of

    case = small_matmul()
    entry = {**case.to_data(), "weights": None, "digest": digest(case.weight())}
    np.testing.assert_array_equal(weight_of(tmp_path, entry), case.weight())
    with pytest.raises(SparseError, match="another weight"):
        weight_of(tmp_path, {**entry, "digest": "0"})


def test_a_line_tells_time_ceilings_and_peers():
    from cuda_run import line

    text = line(
        {
            "name": "decode/x/80",
            "us": {"median": 10.0, "low": 9.0, "high": 11.0},
            "expected_us": 8.0,
            "ceilings": {"bytes_us": 5.0, "flops_us": 1.0},
            "peers": {"cublas": {"median": 20.0, "over_ours": 2.0}},
        }
    )
    assert "bytes 5.0 us (50%)" in text and "cublas 20.0 us (2.00x)" in text


class StandIn(FakeClock):
    """A GPU of which every call takes as long as the last one said, and which is the processor."""

    name, capability, l2_bytes, multiprocessors = "NVIDIA Stand In", 90, 1 << 16, 132

    def seconds(self, work):
        self.now += 1e-3
        return super().seconds(work) + 1e-3


class NumpyPeers:
    """cuBLAS's part is taken by NumPy, cuSPARSE's by something wrong."""

    def __init__(self, case, weight, activations):
        self.x, self.weight = case.input(), weight
        self.count = len(activations)

    def ways(self, peer):
        from cuda_peers import MissingPeerError, Way

        if peer == "cudnn":
            raise MissingPeerError("the layer is no convolution")
        factor = {"cublas": 1, "cusparse": 2}[peer]
        calls = [lambda: factor * self.x @ self.weight.T] * self.count
        return {peer: [Way("NumPy", calls, lambda y: y)]}


@pytest.fixture
def built(tmp_path):
    """A layer compiled for this processor, right at one configuration and wrong at the other."""
    from cuda_build import digest, model_of

    import tvm_sparse as ts

    case = small_matmul()
    weight = case.weight()
    libraries = []
    for number, factor in enumerate((2, 1)):
        module = ts.compile(model_of(case, factor * weight), check=False, threads=1)
        module.export(tmp_path / f"layer{number}.so")
        libraries.append(
            {
                "file": f"layer{number}.so", "kernel": "k", "config": {"number": number},
                "expected_us": 1.0, "packed_bytes": 100,
            }
        )  # fmt: skip
    machine = {
        "arch": "sm_90a", "multiprocessors": 132, "cores": 128, "tensor_macs": 2048,
        "gigahertz": 1.75, "memory_gbytes": 3350,
    }  # fmt: skip
    entry = {
        **case.to_data(), "density": 0.2, "nnz": int(np.count_nonzero(weight)),
        "digest": digest(weight), "weights": None, "libraries": libraries,
    }  # fmt: skip
    overhead = {**entry, "group": "overhead", "libraries": libraries[1:]}
    content = {
        "version": 1, "target": "cuda-sm90a", "machine": machine, "tvm": "0", "tvm_sparse": "0",
        "cases": [entry, overhead], "skipped": {},
    }  # fmt: skip
    (tmp_path / "cases.json").write_text(json.dumps(content))
    return tmp_path


def test_a_whole_run_on_a_stand_in(built, monkeypatch, capsys):
    import cuda_run

    monkeypatch.setattr(cuda_run, "has_gpu", lambda: True)
    monkeypatch.setattr(cuda_run, "Gpu", StandIn)
    monkeypatch.setattr(cuda_run, "CUDA", cuda_run.CPU)
    monkeypatch.setattr(cuda_run, "machine_devices", lambda kind: (1, 0, 2))
    monkeypatch.setattr(cuda_run.cuda_peers, "find_peers", lambda: (NumpyPeers, "no cuSPARSELt"))
    path = built / "figures.json"
    code = cuda_run.run(built, ["cublas", "cusparse", "cudnn"], path, asked=True)
    said = capsys.readouterr().out
    # One configuration computes something else, which is said, and not timed.
    assert code == 1 and "WRONG at {'number': 0}" in said
    (case,) = json.loads(path.read_text())["sections"]["unstructured"]["cases"]
    assert case["config"] == {"number": 1} and case["error_share"] <= 1
    assert list(case["peers"]) == ["cublas"] and case["peers"]["cublas"]["way"] == "NumPy"
    assert "cusparse (NumPy) is off by" in said and "no cuSPARSELt" in said
    assert "a layer of next to no work" in said and case["overhead_us"] > 0
    assert "not measured  tile-wise" in said


def test_a_case_that_fails_does_not_stop_the_others(built, monkeypatch, capsys):
    import cuda_run

    monkeypatch.setattr(cuda_run, "has_gpu", lambda: True)
    monkeypatch.setattr(cuda_run, "Gpu", StandIn)
    monkeypatch.setattr(cuda_run.cuda_peers, "find_peers", lambda: (None, "no peers"))
    data = json.loads((built / "cases.json").read_text())
    data["cases"] = [{**data["cases"][0], "digest": "0"}]
    (built / "cases.json").write_text(json.dumps(data))
    assert cuda_run.run(built, [], built / "figures.json") == 1
    assert "not measured: NumPy draws another weight" in capsys.readouterr().out


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")
def test_without_a_gpu_running_says_so_and_loads_no_compiler(tmp_path):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "cuda.py"), "run", str(tmp_path)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count("\n") == 1 and "needs an NVIDIA GPU" in done.stderr
    program = (
        f"import sys; sys.path.append({str(BENCHMARKS)!r}); import cuda_run; "
        "sys.exit(any(name in sys.modules for name in ('tvm', 'onnx', 'scipy', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120, check=False).returncode == 0


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["matmul", "conv3x3", "conv1x1", "conv1x1 stride 2"])
def test_peers_compute_the_layer(kind):
    """On the processor, where PyTorch has the same operators."""
    torch = pytest.importorskip("torch")
    from cuda_peers import MissingPeerError, TorchPeers
    from cuda_run import Reference

    case = {
        "matmul": small_matmul,
        "conv3x3": small_conv,
        "conv1x1": lambda: small_conv(1),
        "conv1x1 stride 2": lambda: small_conv(1, 2),
    }[kind]()
    weight = case.weight()
    reference = Reference(case, weight)
    peers = TorchPeers(case, weight, [torch.from_numpy(case.input()) for _ in range(2)])
    names = ["cublas", "cusparse", *(["cudnn"] if case.op == "conv2d" else [])]
    for name in names:
        for found in peers.ways(name).values():
            for way in found:
                assert reference.distance(way.read(way.calls[1]())) < 1e-5, way.name
    with pytest.raises(MissingPeerError, match="not 2:4"):
        peers.ways("cusparselt")
