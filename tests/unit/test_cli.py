"""The command line: what it prints, what it writes, and with which code it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import tvm_sparse as ts
from tvm_sparse import bench as bench_module
from tvm_sparse import cli, zoo
from tvm_sparse.bench import BenchCase, BenchResult, SystemTime
from tvm_sparse.errors import CheckError, InputError, SparseError
from tvm_sparse.model import TensorSpec
from tvm_sparse.report import LayerReport, Report
from tvm_sparse.runtime import Profile

REPORT = Report(
    "model.onnx",
    target="x86-64-v4",
    threads=1,
    layers=(
        LayerReport("fc1", "matmul", (16, 32), density=0.1, format="register_tiled"),
        LayerReport("fc2", "matmul", (8, 16), density=1.0, format="dense", reason="no zeros"),
    ),
)


MEASURED = replace(
    REPORT, layers=tuple(replace(layer, measured_us=12.5) for layer in REPORT.layers)
)


@pytest.fixture(autouse=True)
def _threads_stay_as_they_are(monkeypatch):
    monkeypatch.setenv("TVM_NUM_THREADS", os.environ.get("TVM_NUM_THREADS", "1"))


@pytest.fixture
def model_path(tmp_path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save_model(zoo.mlp(sizes=(32, 16, 8)), path)
    return path


def tvm_sparse(*arguments: object, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own; `code` replaces ``-m tvm_sparse``."""
    head = ["-c", code] if code else ["-m", "tvm_sparse"]
    command = [sys.executable, *head, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


class FakeModule:
    """What `compile` returns, as far as the command line uses it."""

    report = REPORT
    refusal = None
    inputs = (TensorSpec("x", (2, 3), "float32"),)

    def profile(self, *inputs: np.ndarray, repeats: int) -> Profile:
        assert [array.shape for array in inputs] == [(2, 3)]
        return Profile((), {}, 1.0, MEASURED)

    def export(self, path: str) -> None:
        Path(path).write_bytes(b"library")


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, dict]]:
    """Replace the compiler; the list holds what it was asked."""
    seen: list[tuple[str, dict]] = []

    def record(name: str, result: object):
        def call(*args: object, **options: object) -> object:
            seen.append((name, {"args": args, **options}))
            return result

        monkeypatch.setattr(ts, name, call, raising=False)

    plan = SimpleNamespace(to_json=lambda path=None: Path(path).write_text("{}"))
    record("load", SimpleNamespace(name="loaded"))
    record("inspect", REPORT)
    record("plan", plan)
    record("compile", FakeModule())
    return seen


# ---------------------------------------------------------------------------------------------
# Usage
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: tvm-sparse" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "COMMAND"),
        ("nosuch", "nosuch"),
        ("prune m.onnx", "-o"),
        ("prune m.onnx -o o.onnx --sparsity 1.5", "from 0 to below 1"),
        ("prune m.onnx -o o.onnx --sparsity many", "could not convert"),
        ("prune m.onnx -o o.onnx --pattern diagonal", "unknown pattern 'diagonal'"),
        ("prune m.onnx -o o.onnx --pattern tile-wise:0", "at least one feature"),
        ("prune m.onnx -o o.onnx --scope network", "invalid choice: 'network'"),
        ("compile m.onnx", "-o"),
        ("compile m.onnx -o m.so --shape x:1,2", "NAME=1,128"),
        ("compile m.onnx -o m.so --shape x=1,b", "NAME=1,128"),
        ("compile m.onnx -o m.so --threads 0", "from 1 on"),
        ("compile m.onnx -o m.so --force fc1", "NAME=FORMAT"),
        ("compile m.onnx -o m.so --plan p.json --force a=dense", "--plan says it all"),
        ("compile m.onnx -o m.so --plan p.json --forbid a", "--plan says it all"),
        ("run m.so --input =x.npy", "names no input"),
        ("bench m.onnx --against onnxruntime,tensorrt", "unknown peer 'tensorrt'"),
        ("bench m.onnx --seconds 0", "no length of time"),
        ("tune m.onnx", "--records"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_why(line, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_help_and_version_come_without_tvm():
    code = (
        "import sys; from tvm_sparse.cli import build_parser; build_parser();"
        "assert 'tvm' not in sys.modules and 'onnx' not in sys.modules"
    )
    assert tvm_sparse(code=code).returncode == 0
    done = tvm_sparse("--version")
    assert done.stdout.strip() == f"tvm-sparse {ts.__version__}"


# ---------------------------------------------------------------------------------------------
# Failures
# ---------------------------------------------------------------------------------------------


def failing(monkeypatch, error: BaseException) -> None:
    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ts, "load", load, raising=False)


def test_a_failed_job_ends_with_1_and_one_line(monkeypatch, capsys):
    failing(monkeypatch, CheckError("layer 'fc1' is wrong"))
    assert cli.main(["inspect", "m.onnx"]) == 1
    assert capsys.readouterr().err == "tvm-sparse: layer 'fc1' is wrong\n"


def test_debug_shows_the_traceback(monkeypatch):
    failing(monkeypatch, CheckError("layer 'fc1' is wrong"))
    with pytest.raises(CheckError):
        cli.main(["inspect", "m.onnx", "--debug"])


def test_an_unexpected_error_is_one_line_too_and_points_to_debug(monkeypatch, capsys):
    failing(monkeypatch, RuntimeError("first\n" * 40 + "the end of a long story"))
    assert cli.main(["inspect", "m.onnx"]) == 1
    line = capsys.readouterr().err
    assert line == "tvm-sparse: RuntimeError: the end of a long story (--debug shows where)\n"


def test_ctrl_c_ends_with_130_and_a_line(monkeypatch, capsys):
    failing(monkeypatch, KeyboardInterrupt())
    assert cli.main(["inspect", "m.onnx"]) == 130
    assert capsys.readouterr().err == "tvm-sparse: stopped\n"


def test_a_closed_pipe_is_no_error(model_path):
    script = (
        f"{sys.executable} -m tvm_sparse prune {model_path} -o {model_path}.out --sparsity 0.5 "
        "| true; echo ${PIPESTATUS[0]}"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0", done.stderr
    assert done.stderr == ""


# ---------------------------------------------------------------------------------------------
# inspect, prune, tune, compile
# ---------------------------------------------------------------------------------------------


def test_a_torch_program_that_is_none_is_refused_in_words(tmp_path, capsys):
    path = tmp_path / "model.pt2"
    assert cli.main(["inspect", str(path)]) == 1
    assert "there is no file" in capsys.readouterr().err
    pytest.importorskip("torch")
    path.write_text("no program")
    assert cli.main(["inspect", str(path)]) == 1
    assert "not a file that torch.export.save wrote" in capsys.readouterr().err


def test_serving_without_its_extra_says_what_to_install(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("tvm_sparse.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", "model.so"]) == 1
    said = capsys.readouterr().err
    assert "serving needs uvicorn, which is not installed: pip install tvm-sparse[serve]" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--port", "65536"], "no port"),
        (["--max-queue", "0"], "no whole number from 1 on"),
        (["--max-size", "512"], "write NAME=512"),
        (["--timeout", "-1"], "no length of time"),
    ],
)
def test_wrong_options_of_serve_are_wrong_usage(options, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", "model.so", *options])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_inspect_prints_a_table_and_writes_json(calls, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert cli.main(["inspect", "m.onnx", "--shape", "x=1,32", "--json", str(path)]) == 0
    assert "fc1" in capsys.readouterr().out
    assert Report.from_json(path.read_text()).layers == REPORT.layers
    assert calls[0] == ("load", {"args": ("m.onnx",), "shapes": {"x": (1, 32)}, "weights": None})


def test_inspect_writes_nothing_but_json_to_standard_output(calls, capsys):
    assert cli.main(["inspect", "m.onnx", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == "model.onnx"


def test_prune_writes_the_pruned_model(model_path, tmp_path, capsys):
    out = tmp_path / "pruned.onnx"
    line = ["prune", model_path, "-o", out, "--sparsity", "75%", "--scope", "layer"]
    assert cli.main([*map(str, line), "--skip", "fc2"]) == 0
    assert "75.0%" in capsys.readouterr().out
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    assert np.count_nonzero(weights["fc1.weight"]) == 128
    assert np.count_nonzero(weights["fc2.weight"]) == 128
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "pruned.onnx"]


def test_prune_removes_channels_and_says_which(model_path, tmp_path, capsys):
    whole, small = tmp_path / "whole.onnx", tmp_path / "small.onnx"
    line = f"prune {model_path} --pattern channel --sparsity 0.5 --scope layer -o".split()
    assert cli.main([*line, str(whole)]) == 0
    assert cli.main([*line, str(small), "--remove-channels"]) == 0
    assert "removed" in capsys.readouterr().out
    assert small.stat().st_size < whole.stat().st_size


def test_prune_takes_gradients_and_calibration_inputs_from_files(model_path, tmp_path, capsys):
    model = onnx.load(model_path)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    gradients = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    np.savez(tmp_path / "gradients.npz", **gradients)
    value = model.graph.input[0]
    sizes = [dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim]
    np.save(tmp_path / "x.npy", np.ones(sizes, np.float32))
    out = tmp_path / "out.onnx"
    line = ["prune", str(model_path), "-o", str(out), "--scores"]
    assert cli.main([*line, "taylor", "--gradients", str(tmp_path / "gradients.npz")]) == 0
    assert "by taylor" in capsys.readouterr().out
    calibration = f"{value.name}={tmp_path / 'x.npy'}"
    assert cli.main([*line, "wanda", "--calibration", calibration]) == 0
    assert "scope row, by wanda" in capsys.readouterr().out
    assert cli.main([*line, "wanda"]) == 1
    assert "calibration inputs go together" in capsys.readouterr().err


def test_prune_to_n_of_m_needs_no_sparsity(model_path, tmp_path):
    out = tmp_path / "pruned.onnx"
    assert cli.main(["prune", str(model_path), "-o", str(out), "--pattern", "1:4"]) == 0
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    assert np.count_nonzero(weights["fc1.weight"]) == 128


def test_tune_prints_its_table_and_writes_the_report(calls, monkeypatch, tmp_path, capsys):
    asked: dict[str, object] = {}

    class Found:
        report = REPORT

        def __str__(self) -> str:
            return "the table"

    monkeypatch.setattr(ts, "tune", lambda model, **given: asked.update(given) or Found())
    page = tmp_path / "tuned.html"
    line = ["tune", "m.onnx", "--records", str(tmp_path / "r.jsonl"), "--report", str(page)]
    fleet = ["--tracker", "127.0.0.1:9190", "--key", "box", "--trials", "5", "--seconds", "9"]
    assert cli.main([*line, *fleet]) == 0
    assert (asked["tracker"], asked["trials"], asked["seconds"]) == ("127.0.0.1:9190/box", 5, 9)
    assert "the table" in capsys.readouterr().out
    assert "fc1" in page.read_text()


def test_a_tracker_and_its_key_go_together(calls, tmp_path):
    with pytest.raises(SystemExit) as wrong:
        cli.main(["tune", "m.onnx", "--records", str(tmp_path / "r"), "--tracker", "127.0.0.1:1"])
    assert wrong.value.code == 2


def test_compile_exports_the_library_and_the_report(calls, tmp_path, capsys):
    library, report = tmp_path / "m.so", tmp_path / "report.json"
    line = ["compile", "m.onnx", "-o", str(library), "--report", str(report), "--no-check"]
    assert cli.main([*line, "--target", "x86-64-v3", "--threads", "2"]) == 0
    assert library.read_bytes() == b"library"
    assert Report.from_json(report.read_text()).layers == REPORT.layers
    options = dict(calls)["compile"]
    assert (options["target"], options["check"], options["plan"]) == ("x86-64-v3", False, None)
    assert os.environ["TVM_NUM_THREADS"] == "2"
    assert "not checked" in capsys.readouterr().out


def test_compile_plans_with_what_is_forced_and_forbidden(calls, tmp_path):
    saved = tmp_path / "plan.json"
    line = ["compile", "m.onnx", "-o", str(tmp_path / "m.so"), "--save-plan", str(saved)]
    line += ["--force", "fc1=dense", "--force", "enc*=register_tiled", "--forbid", "head"]
    assert cli.main(line) == 0
    options = dict(calls)["plan"]
    assert options["force"] == {"fc1": "dense", "enc*": "register_tiled"}
    assert options["forbid"] == ["head"]
    assert saved.exists()
    assert dict(calls)["compile"]["plan"] is not None


@pytest.mark.parametrize(
    ("output", "words"),
    [("missing/m.so", "there is no folder"), (".", "is a folder")],
)
def test_compile_refuses_a_hopeless_output_before_the_work(calls, tmp_path, output, words, capsys):
    assert cli.main(["compile", "m.onnx", "-o", str(tmp_path / output)]) == 1
    assert words in capsys.readouterr().err
    assert not calls


@pytest.mark.parametrize("name", ["r.html", "r.HTML"])
def test_compile_writes_an_html_report_where_the_name_says_so(calls, tmp_path, name):
    path = tmp_path / name
    line = ["compile", "m.onnx", "-o", str(tmp_path / "m.so"), "--report", str(path)]
    assert cli.main(line) == 0
    assert path.read_text() == MEASURED.to_html()


@pytest.mark.parametrize(
    "lacks",
    [
        {"refusal": "needs instructions that this machine lacks"},
        {"inputs": (TensorSpec("x", ("batch", 3), "float32"),)},
    ],
    ids=["another machine", "symbolic sizes"],
)
def test_a_report_has_no_measured_times_where_they_would_be_guesses(
    calls, monkeypatch, tmp_path, lacks
):
    for name, value in lacks.items():
        monkeypatch.setattr(FakeModule, name, value)
    path = tmp_path / "report.json"
    assert cli.main(["compile", "m.onnx", "-o", str(tmp_path / "m.so"), "--report", str(path)]) == 0
    assert Report.from_json(path.read_text()) == REPORT


@pytest.mark.parametrize("name", ["r.txt", "report"])
def test_a_report_of_another_kind_is_refused_before_the_work(calls, tmp_path, capsys, name):
    line = ["compile", "m.onnx", "-o", str(tmp_path / "m.so"), "--report", str(tmp_path / name)]
    assert cli.main(line) == 1
    error = capsys.readouterr().err
    assert ".html or .json" in error and name in error and error.count("\n") == 1
    assert not calls


def test_a_plan_file_that_is_not_there_is_said(calls, tmp_path, capsys):
    line = ["compile", "m.onnx", "-o", str(tmp_path / "m.so"), "--plan", str(tmp_path / "none")]
    assert cli.main(line) == 1
    assert "none" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# run
# ---------------------------------------------------------------------------------------------


def test_inputs_come_from_npy_and_npz_files(tmp_path):
    x, y = np.arange(3.0), np.ones((2, 2), np.float32)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "both.npz", x=x, y=y)
    np.savez(tmp_path / "one.npz", other=y)
    npy, both, one = (str(tmp_path / name) for name in ("x.npy", "both.npz", "one.npz"))
    assert cli.read_inputs([("x", npy)], ["x"])["x"].tolist() == x.tolist()
    assert cli.read_inputs([("", npy)], ["x"])["x"].tolist() == x.tolist()
    assert set(cli.read_inputs([("", both)], ["x", "y"])) == {"x", "y"}
    assert cli.read_inputs([("y", both)], ["y"])["y"].shape == (2, 2)
    assert cli.read_inputs([("y", one)], ["y"])["y"].shape == (2, 2)


def test_inputs_that_cannot_be_read_are_refused_in_words(tmp_path):
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "pickle.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "both.npz", a=np.zeros(1), b=np.zeros(1))
    for name in ("broken.npy", "text.npz", "pickle.npy"):
        with pytest.raises(InputError, match=f"{name}' cannot be read"):
            cli.read_inputs([("x", str(tmp_path / name))], ["x"])
    with pytest.raises(InputError, match="there is no file"):
        cli.read_inputs([("x", str(tmp_path / "none.npy"))], ["x"])
    with pytest.raises(InputError, match="holds a, b, and no 'x'"):
        cli.read_inputs([("x", str(tmp_path / "both.npz"))], ["x"])
    with pytest.raises(InputError, match="the model needs ids, mask"):
        cli.read_inputs([], ["ids", "mask"])


def test_outputs_keep_their_own_names_and_values(tmp_path):
    arrays = {"file": np.arange(3), "a/b:0": np.float32([[np.nan, np.inf]]), "": np.zeros((0, 2))}
    path = tmp_path / "out.npz"
    cli.save_arrays(str(path), arrays)
    with np.load(path) as found:
        assert set(found.files) == set(arrays)
        for name, value in arrays.items():
            assert np.array_equal(found[name], value, equal_nan=True)
            assert found[name].dtype == value.dtype
    with pytest.raises(SparseError, match="3 outputs do not fit"):
        cli.save_arrays(str(tmp_path / "out.npy"), arrays)
    cli.save_arrays(str(tmp_path / "one.npy"), {"y": np.arange(3)})
    assert np.load(tmp_path / "one.npy").tolist() == [0, 1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.npy", "out.npz"]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A library exported from a small stock TVM module: y = 2 x."""
    tvm = pytest.importorskip("tvm")
    from tvm import relax

    from tvm_sparse.cpu_features import required_features
    from tvm_sparse.deploy import wrap_executable
    from tvm_sparse.manifest import Manifest
    from tvm_sparse.model import TensorSpec

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(relax.op.multiply(x, relax.const(2.0, "float32")))
        builder.emit_func_output(y)
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v2"})
    executable = tvm.compile(builder.get(), target)
    manifest = Manifest(
        package_version=ts.__version__,
        tvm_version=tvm.__version__,
        target={"kind": "llvm", "mcpu": "x86-64-v2"},
        cpu_features=required_features(target),
        threads=1,
        inputs=(TensorSpec("in put", (2, 3), "float32"),),
        outputs=(TensorSpec("y:0", (2, 3), "float32"),),
        plan={},
        report=json.loads(REPORT.to_json()),
        digest="",
        kernels={},
    )
    path = tmp_path_factory.mktemp("library") / "double.so"
    wrap_executable(executable, manifest, 1).export(path)
    return path


def test_run_needs_no_compiler(library, tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys; from tvm_sparse.cli import main; code = main(sys.argv[1:]);"
        "assert not {'tvm', 'onnx'} & set(sys.modules); sys.exit(code)"
    )
    out = tmp_path / "out.npz"
    arguments = ["run", library, "--input", f"in put={tmp_path / 'x.npy'}", "--output", out]
    done = tvm_sparse(*arguments, code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("y:0: float32 [2, 3]  min 0  mean 5  max 10\n")
    with np.load(out) as found:
        assert np.array_equal(found["y:0"], 2 * x)


@pytest.mark.parametrize(
    ("array", "name", "words"),
    [
        (np.zeros((2, 3)), "in put", "float64"),
        (np.zeros((2, 4), np.float32), "in put", "4"),
        (np.zeros((2, 3), np.float32), "other", "other"),
    ],
)
def test_run_refuses_inputs_that_do_not_fit(library, tmp_path, array, name, words, capsys):
    np.save(tmp_path / "x.npy", array)
    assert cli.main(["run", str(library), "--input", f"{name}={tmp_path / 'x.npy'}"]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_run_refuses_what_is_no_library(tmp_path, capsys):
    path = tmp_path / "x.so"
    path.write_text("no library")
    for name in (str(path), str(tmp_path / "none.so")):
        assert cli.main(["run", name, "--input", "x=x.npy"]) == 1
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------------------
# bench
# ---------------------------------------------------------------------------------------------


def result(ours: SystemTime) -> BenchResult:
    systems = (ours, SystemTime("onnxruntime", 3.0, 2.9, 3.1, error=0.0))
    case = BenchCase("model", 1, 0.9, {"x": (1, 2)}, (0,), "onnxruntime", 5, systems)
    return BenchResult("a processor", "Linux", {"onnxruntime": "1"}, "2026-01-01", (case,))


def test_bench_prints_the_table_and_writes_json(monkeypatch, tmp_path, capsys):
    seen = {}

    def fake(model, against, threads, **options):
        seen.update(options, against=against, threads=threads)
        return result(SystemTime("tvm_sparse", 1.0, 0.9, 1.1, error=0.0))

    monkeypatch.setattr(bench_module, "bench", fake)
    path = tmp_path / "bench.json"
    line = ["bench", "m.onnx", "--against", "onnxruntime", "--threads", "2", "--json", str(path)]
    assert cli.main(line) == 0
    assert "3.00x" in capsys.readouterr().out
    assert BenchResult.from_json(path.read_text()).cases[0].speedup == 3.0
    assert (seen["against"], seen["threads"]) == (("onnxruntime",), 2)


def test_bench_ends_with_1_when_this_package_failed(monkeypatch, capsys):
    failure = SystemTime("tvm_sparse", failure="its output is wrong")
    monkeypatch.setattr(bench_module, "bench", lambda *_, **__: result(failure))
    assert cli.main(["bench", "m.onnx"]) == 1
    assert "its output is wrong" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# demo
# ---------------------------------------------------------------------------------------------


def test_the_demo_gets_what_the_command_line_says(monkeypatch, tmp_path):
    from tvm_sparse import demo

    seen = {}
    monkeypatch.setattr(demo, "demo", lambda **options: seen.update(options))
    line = ["demo", "--model", "mobilenet", "--threads", "2", "-o", str(tmp_path)]
    assert cli.main(line) == 0
    assert seen == {"folder": str(tmp_path), "threads": 2, "model": "mobilenet"}


def test_every_model_that_the_demo_offers_can_be_built():
    from tvm_sparse import demo
    from tvm_sparse.pruning import prune_with_report

    options = cli.build_parser().parse_args(["demo"])
    assert options.model in demo.MODELS
    for _, build in demo.MODELS.values():
        model, skip = build()
        assert not prune_with_report(model, sparsity=0.5, skip=skip).notes
