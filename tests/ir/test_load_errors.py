"""What a user reads when a model cannot be loaded: one sentence that says what and where."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from load_support import onnx_model, random
from onnx import TensorProto, helper

from tvm_sparse.errors import ModelError
from tvm_sparse.frontends.loading import load

node = helper.make_node


def mlp() -> onnx.ModelProto:
    nodes = [node("MatMul", ["x", "w"], ["y"], name="first")]
    return onnx_model(nodes, {"w": random(64, 50)}, {"x": ("N", 64)})


def sentence(source: object, **options: object) -> str:
    with pytest.raises(ModelError) as caught:
        load(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_missing_file(tmp_path):
    assert "there is no file" in sentence(tmp_path / "nothing.onnx")


def test_a_folder(tmp_path):
    assert "is a folder" in sentence(tmp_path)


def test_an_empty_file(tmp_path):
    path = tmp_path / "empty.onnx"
    path.touch()
    assert sentence(path).endswith("empty.onnx' is empty")


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "text.onnx"
    path.write_text("this is no model\n" * 20)
    assert "is not an ONNX file, or it is cut off" in sentence(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_off(tmp_path, share):
    data = mlp().SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(len(data) * share)])
    assert "cut.onnx" in sentence(path)


def test_a_protobuf_without_a_graph():
    assert "holds no graph" in sentence(onnx.ModelProto(ir_version=8).SerializeToString())


def test_a_graph_without_outputs():
    proto = mlp()
    del proto.graph.output[:]
    assert "has no outputs" in sentence(proto)


def test_external_data_that_is_missing_or_short(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save_model(mlp(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    data = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(data[:-4])
    assert "'w.bin' ends within the weight 'w'" in sentence(path)
    (tmp_path / "w.bin").unlink()
    assert "'w.bin' with the weight 'w' is missing" in sentence(path)
    assert "pass the model's path" in sentence(path.read_bytes())


@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname"])
def test_external_data_outside_the_folder(tmp_path, location):
    path = tmp_path / "inner" / "m.onnx"
    path.parent.mkdir()
    onnx.save_model(mlp(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = location
    path.write_bytes(proto.SerializeToString())
    assert "outside the model's folder" in sentence(path)


def test_a_damaged_initializer():
    proto = mlp()
    proto.graph.initializer[0].raw_data = b"123"
    assert "the initialiser 'w'" in sentence(proto)


def test_a_sparse_initializer_with_wrong_indices():
    proto = onnx_model([node("MatMul", ["x", "w"], ["y"])], {}, {"x": (2, 3)})
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [99])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [3, 4]))
    assert "the sparse initialiser 'w' has indices that do not fit" in sentence(proto)


def test_an_unknown_operator_names_itself_its_node_and_domain():
    nodes = [node("Frobnicate", ["x"], ["y"], name="odd", domain="acme.ai")]
    text = sentence(onnx_model(nodes, {}, {"x": (2, 3)}))
    assert text == "the operator Frobnicate of the domain 'acme.ai' (node 'odd') is not supported"


def test_a_standard_operator_that_the_importer_lacks():
    nodes = [node("QLinearMatMul", ["x", "s", "z", "x", "s", "z", "s", "z"], ["y"], name="q")]
    weights = {"s": np.float32(1), "z": np.uint8(0)}
    text = sentence(onnx_model(nodes, weights, {"x": (2, 2)}, dtype=TensorProto.UINT8))
    assert text == "the operator QLinearMatMul (node 'q') is not supported"


def test_a_familiar_operator_of_a_foreign_domain_is_not_taken_for_the_standard_one():
    nodes = [node("Relu", ["x"], ["y"], name="r", domain="acme.ai")]
    assert "of the domain 'acme.ai'" in sentence(onnx_model(nodes, {}, {"x": (2, 3)}))


def test_a_node_whose_conversion_fails_is_named():
    nodes = [node("Conv", ["x", "w"], ["y"], name="c")]
    text = sentence(onnx_model(nodes, {"w": random(4, 3, 3, 3)}, {"x": (1, 5, 8, 8)}))
    assert "Conv (node 'c')" in text


def test_a_loop():
    names = [("i", TensorProto.INT64), ("c", TensorProto.BOOL), ("a", TensorProto.FLOAT)]
    values = [helper.make_tensor_value_info(name, kind, None) for name, kind in names]
    results = [helper.make_tensor_value_info(name, kind, None) for name, kind in names[1:]]
    results[1].name = "r"
    body = helper.make_graph([node("Relu", ["a"], ["r"])], "b", values, results)
    nodes = [node("Loop", ["", "", "x"], ["y"], name="l", body=body)]
    assert "'l' (Loop) repeats a part of the graph" in sentence(
        onnx_model(nodes, {}, {"x": (2, 4)})
    )


def test_what_a_branch_reads_exists():
    value = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    branch = helper.make_graph([node("Relu", ["nowhere"], ["r"])], "b", [], [value])
    nodes = [
        node("ReduceSum", ["x"], ["s"], keepdims=0),
        node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
        node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
    ]
    assert "reads 'nowhere', which nothing" in sentence(onnx_model(nodes, {}, {"x": (2, 4)}))


def test_an_optional_sequence():
    proto = onnx_model([node("Relu", ["x"], ["y"])], {}, {"x": (2, 4)})
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    sequence = helper.make_optional_type_proto(helper.make_sequence_type_proto(tensor))
    proto.graph.input[0].type.CopyFrom(sequence)
    assert sentence(proto) == "the input 'x' is not a tensor"


def test_a_value_that_nothing_computes():
    proto = onnx_model([node("Add", ["x", "ghost"], ["y"], name="a")], {}, {"x": (2, 3)})
    assert sentence(proto) == "the node 'a' reads 'ghost', which nothing computes first"


def test_an_output_that_nothing_computes():
    proto = onnx_model([node("Relu", ["x"], ["z"])], {}, {"x": (2, 3)})
    assert sentence(proto) == "nothing computes the output 'y'"


def test_an_opset_from_the_future():
    proto = mlp()
    proto.opset_import[0].version = 999
    assert "the model uses opset 999" in sentence(proto)


def test_an_input_of_unknown_shape():
    proto = mlp()
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    assert "the shape of input 'x' is unknown" in sentence(proto)
    assert load(proto, shapes={"x": (2, 64)}).inputs[0].shape == (2, 64)


def test_an_input_that_is_no_tensor():
    proto = mlp()
    sequence = helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None)
    proto.graph.input[0].CopyFrom(sequence)
    assert sentence(proto) == "the input 'x' is not a tensor"


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"z": (1, 64)}, "the model has no input 'z'; its inputs are 'x'"),
        ({"x": (1, 2, 64)}, "'x' has 2 dimensions (N, 64), but the given shape (1, 2, 64) has 3"),
        ({"x": (1, 63)}, "does not fit input 'x' (N, 64): it is 64, not 63"),
        ({"x": (0, 64)}, "is not positive"),
    ],
)
def test_shapes_that_do_not_fit(shapes, words):
    assert words in sentence(mlp(), shapes=shapes)


def test_a_symbol_with_two_sizes():
    nodes = [node("Add", ["a", "b"], ["y"])]
    proto = onnx_model(nodes, {}, {"a": ("N", 4), "b": ("N", 4)})
    assert "'N' is 2 already, not 3" in sentence(proto, shapes={"a": (2, 4), "b": (3, 4)})


def test_a_shape_with_which_the_graph_cannot_work():
    nodes = [node("MatMul", ["x", "w"], ["y"], name="mm")]
    proto = onnx_model(nodes, {"w": random(64, 8)}, {"x": ("N", "K")})
    assert "MatMul (node 'mm')" in sentence(proto, shapes={"x": (2, 60)})


@pytest.mark.parametrize("make", [lambda: 3, lambda: None, lambda: {"a": 1}, lambda: np.zeros(3)])
def test_something_that_is_no_model(make: Callable[[], object]):
    assert "cannot load a" in sentence(make())


def test_parameters_for_a_model_that_has_its_own():
    assert "params are for Relax modules" in sentence(mlp(), params={"w": random(2, 2)})
