"""`InferenceSession`: ONNX Runtime's answers and descriptions, from a library that is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.cache import LibraryCache
from tvm_sparse.errors import InputError, ModelError, TargetError


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("TVM_SPARSE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TVM_SPARSE_CACHE_BYTES", raising=False)


def several() -> onnx.ModelProto:
    """Two inputs of two types, a symbolic dimension, and three outputs."""
    weight = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="fc"),
        helper.make_node("Add", ["y", "b"], ["sum"]),
        helper.make_node("Add", ["n", "n"], ["twice"]),
    ]
    graph = helper.make_graph(
        nodes,
        "several",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6]),
            helper.make_tensor_value_info("n", TensorProto.INT64, [3]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4]),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["batch", 4]),
            helper.make_tensor_value_info("twice", TensorProto.INT64, [3]),
        ],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.ones(4, np.float32), "b"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.producer_name, model.model_version = "a test", 3
    entry = model.metadata_props.add()
    entry.key, entry.value = "author", "nobody"
    return model


MODELS = {
    "several": several,
    "mlp": lambda: ts.prune(zoo.mlp(sizes=(32, 16, 8)), sparsity=0.8),
    "convolutions": lambda: ts.prune(zoo.mobilenet_v1(size=32), sparsity=0.8),
    "an encoder": lambda: zoo.bert_encoder(1, 64, 2, 128, seq=16, symbolic=True),
}


def feed_of(session: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    feed = {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else 2 for size in value.shape]
        array = rng.standard_normal(shape) * 3
        feed[value.name] = array.astype("int64" if value.type == "tensor(int64)" else "float32")
    return feed


def both(model: onnx.ModelProto, **options: Any) -> tuple[Any, ts.InferenceSession]:
    data = model.SerializeToString()
    theirs = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return theirs, ts.InferenceSession(data, providers=["CPUExecutionProvider"], **options)


@pytest.mark.parametrize("name", MODELS)
def test_answers_and_descriptions_are_those_of_onnxruntime(name):
    theirs, ours = both(MODELS[name]())
    for get in ("get_inputs", "get_outputs"):
        assert [(v.name, v.shape, v.type) for v in getattr(ours, get)()] == [
            (v.name, v.shape, v.type) for v in getattr(theirs, get)()
        ]
    feed = feed_of(theirs)
    wanted, found = theirs.run(None, feed), ours.run(None, feed)
    assert isinstance(found, list)
    for left, right in zip(wanted, found, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_allclose(right, left, rtol=0, atol=1e-4 * max(np.abs(left).max(), 1))


def test_outputs_come_in_the_order_that_was_asked_for():
    theirs, ours = both(several())
    feed = feed_of(theirs)
    for names in (["twice", "y"], ["sum"], []):
        for left, right in zip(theirs.run(names, feed), ours.run(names, feed), strict=True):
            np.testing.assert_allclose(right, left, rtol=0, atol=1e-5)


def test_what_the_model_says_of_itself_is_kept_with_the_library():
    theirs, _ = both(several())
    again = both(several())[1]
    assert again.from_cache
    mine, meta = again.get_modelmeta(), theirs.get_modelmeta()
    for name in ("producer_name", "graph_name", "version", "domain", "custom_metadata_map"):
        assert getattr(mine, name) == getattr(meta, name)


def test_unknown_names_are_sentences():
    session = both(several())[1]
    with pytest.raises(InputError, match=r"no output 'z'; its outputs are 'y', 'sum', 'twice'"):
        session.run(["z"], feed_of(session))
    with pytest.raises(InputError, match=r"does not know 'q' and misses 'n'"):
        session.run(None, {"x": np.zeros((1, 6), np.float32), "q": np.zeros(3)})


def test_plain_numbers_are_taken_as_arrays():
    session = both(several())[1]
    [twice] = session.run(["twice"], {"x": [[0.0] * 6], "n": [1, 2, 3]})
    assert twice.tolist() == [2, 4, 6]
    with pytest.raises(InputError, match="cannot be read as int64"):
        session.run(None, {"x": [[0.0] * 6], "n": ["one", "two", "three"]})


def test_options_of_onnxruntime_give_the_threads():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = ts.InferenceSession(several().SerializeToString(), options)
    assert session.module.threads == 1
    assert session.get_session_options() is options
    assert session.get_providers() == ["CPUExecutionProvider"]
    like = SimpleNamespace(intra_op_num_threads=1)
    assert ts.InferenceSession(several().SerializeToString(), like).from_cache


def test_providers_that_mean_nothing_here_are_warned_of():
    with pytest.warns(RuntimeWarning, match="'CUDAExecutionProvider' is a part of ONNX Runtime"):
        ts.InferenceSession(
            several().SerializeToString(),
            providers=[("CUDAExecutionProvider", {"device_id": 0}), "CPUExecutionProvider"],
        )


@pytest.mark.parametrize(
    ("source", "words"),
    [("no.onnx", "there is no file"), (b"no model", "is not an ONNX file"), (3, "not a int")],
)
def test_what_is_no_model_is_a_sentence(source, words, tmp_path):
    given = tmp_path / source if isinstance(source, str) else source
    with pytest.raises(ModelError, match=words):
        ts.InferenceSession(given)


def test_a_target_that_does_not_run_here_is_a_sentence_at_once(monkeypatch):
    monkeypatch.setattr("tvm_sparse.deploy.missing_features", lambda *_: ["avx512f"])
    with pytest.raises(TargetError, match="lacks"):
        ts.InferenceSession(several().SerializeToString())


# The cache ---------------------------------------------------------------------------------------


def test_the_second_session_loads_what_the_first_compiled(monkeypatch):
    first = both(several())[1]
    monkeypatch.setattr("tvm_sparse.compiler.compile", None)
    second = both(several())[1]
    assert (first.from_cache, second.from_cache) == (False, True)
    feed = feed_of(first)
    for left, right in zip(first.run(None, feed), second.run(None, feed), strict=True):
        assert np.array_equal(left, right)
    # Libraries hold no pictures.
    assert second.report.layers == first.report.without_pictures().layers


def test_other_options_are_other_libraries():
    both(several())
    assert not both(several(), shapes={"x": (2, 6)})[1].from_cache
    assert not both(several(), check=False)[1].from_cache
    assert len(LibraryCache().entries()) == 3


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_library_is_said_and_made_anew(damage):
    first = both(several())[1]
    [library] = LibraryCache().entries()
    data = library.path.read_bytes()
    # Not in place: the first session has the file mapped, as it would not be after an update.
    library.path.unlink()
    library.path.write_bytes(data[:-100] if damage == "cut" else data[:-1] + b"\x7f")
    with pytest.warns(RuntimeWarning, match="the library kept for bytes is damaged"):
        second = both(several())[1]
    assert not second.from_cache
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        third = both(several())[1]
    assert third.from_cache
    feed = feed_of(first)
    assert np.array_equal(first.run(None, feed)[0], third.run(None, feed)[0])


def test_a_session_lives_on_after_its_library_was_removed(monkeypatch):
    both(several())
    session = both(several())[1]
    wanted = session.run(None, feed_of(session))
    assert len(LibraryCache().clear()) == 1
    for left, right in zip(wanted, session.run(None, feed_of(session)), strict=True):
        assert np.array_equal(left, right)


def test_nothing_is_kept_where_nothing_may_be(monkeypatch, tmp_path):
    monkeypatch.setenv("TVM_SPARSE_CACHE_BYTES", "0")
    assert not both(several())[1].from_cache
    assert not both(several())[1].from_cache
    assert not (tmp_path / "home").exists()


def test_a_folder_that_cannot_be_made_is_said_and_the_session_works(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="is not kept in '.*file/libraries'"):
        session = ts.InferenceSession(
            several().SerializeToString(), cache=tmp_path / "file" / "libraries"
        )
    assert session.run(["twice"], feed_of(session))[0].shape == (3,)


_PROCESS = """
import json, sys, numpy as np
import tvm_sparse as ts
from tvm_sparse import compiler
compile_model, count = compiler.compile, 0
def counted(*args, **options):
    global count
    count += 1
    return compile_model(*args, **options)
compiler.compile = counted
session = ts.InferenceSession(sys.argv[1])
[y] = session.run(["y"], {"x": np.ones((2, 6), np.float32), "n": np.arange(3)})
print(json.dumps({"compiled": count, "y": y.tolist(), "tvm": "tvm" in sys.modules}))
"""


def test_of_two_processes_one_compiles(tmp_path):
    path = tmp_path / "several.onnx"
    onnx.save_model(several(), path)
    command = [sys.executable, "-c", _PROCESS, str(path)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) for _ in range(2)
    ]
    found = [json.loads(process.communicate(timeout=240)[0]) for process in started]
    assert sorted(item["compiled"] for item in found) == [0, 1]
    assert found[0]["y"] == found[1]["y"]
    [library] = LibraryCache().entries()
    assert library.about["model"] == "'several.onnx'"


def test_a_model_that_is_kept_starts_without_the_compiler(tmp_path):
    path = tmp_path / "several.onnx"
    onnx.save_model(several(), path)
    ts.InferenceSession(path)
    code = (
        "import sys, tvm_sparse as ts; s = ts.InferenceSession(sys.argv[1]); "
        "print(s.from_cache, 'tvm' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert result.stdout.split() == ["True", "False"]


def test_external_data_is_part_of_the_model(tmp_path):
    def save(scale: float) -> Path:
        model = several()
        weight = numpy_helper.to_array(model.graph.initializer[0]) * np.float32(scale)
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
        onnx.save_model(
            model,
            tmp_path / "m.onnx",
            save_as_external_data=True,
            location="m.data",
            size_threshold=0,
        )
        return tmp_path / "m.onnx"

    first = ts.InferenceSession(save(1.0))
    feed = feed_of(first)
    (tmp_path / "m.data").unlink()
    second = ts.InferenceSession(save(2.0))
    assert not second.from_cache
    np.testing.assert_allclose(second.run(["y"], feed)[0], 2 * first.run(["y"], feed)[0], rtol=1e-5)
