"""Files that the command line writes appear whole or not at all."""

from __future__ import annotations

import os
import stat

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import tvm_sparse as ts
from tvm_sparse import cli, files, zoo
from tvm_sparse.dtypes import numpy_dtype
from tvm_sparse.errors import SparseError


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    with files.written_beside(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    with pytest.raises(KeyError), files.written_beside(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    files.write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "text"


def test_a_device_is_written_to_and_not_replaced():
    files.write_text(os.devnull, "text")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_folder_that_is_missing_is_refused_in_words(tmp_path):
    with pytest.raises(SparseError, match="cannot be written: No such file"):
        files.write_text(tmp_path / "none" / "out", "text")


def test_a_model_beyond_the_protobuf_limit_gets_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_PROTOBUF", 1000)
    model = zoo.mlp(sizes=(32, 16, 8))
    before = model.SerializeToString()
    path = tmp_path / "big.onnx"
    files.save_onnx(model, path)
    assert sorted(os.listdir(tmp_path)) == ["big.onnx", "big.onnx.data"]
    assert model.SerializeToString() == before
    found = {t.name: numpy_helper.to_array(t) for t in files.read_onnx(path).graph.initializer}
    for tensor in onnx.load_from_string(before).graph.initializer:
        assert np.array_equal(found[tensor.name], numpy_helper.to_array(tensor))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_arrays_in_half_precision_are_written_and_read_again(tmp_path, dtype):
    values = np.array([[1.5, -0.0, np.inf]]).astype(numpy_dtype(dtype))
    for name in ("x.npy", "x.npz"):
        cli.save_arrays(str(tmp_path / name), {"x": values})
        found = cli.read_inputs([("x", str(tmp_path / name))], ["x"])["x"]
        found = cli.as_declared(found, dtype)
        assert str(found.dtype) == dtype
        assert np.array_equal(found, values)
    assert cli.as_declared(values.astype(np.float32), dtype).dtype == np.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_library_in_half_precision_runs_on_files(tmp_path, dtype, capsys):
    library, given, result = (tmp_path / name for name in ("model.so", "x.npy", "y.npy"))
    module = ts.compile(zoo.single_matmul(4, 8, 3, dtype=dtype), threads=1)
    module.export(library)
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(numpy_dtype(dtype))
    np.save(given, x)
    run = ["run", str(library), "--input", f"input={given}", "--output", str(result)]
    assert cli.main(run) == 0
    assert capsys.readouterr().out.startswith(f"output: {dtype} [3, 4]  min ")
    assert np.array_equal(cli.as_declared(np.load(result), dtype), module(x))
    np.save(given, x.astype(np.float32))
    assert cli.main(run) == 1
    error = capsys.readouterr().err
    assert f"'input' is float32, and the model wants {dtype}" in error
    assert error.count("\n") == 1
