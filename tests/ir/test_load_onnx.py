"""What loading an ONNX model gives: weights, names, shapes, and the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from load_support import assert_close, onnx_model, ops_of, random, run_model, run_onnx
from onnx import TensorProto, helper, numpy_helper
from tvm_sparse.passes.canonicalize import check_canonical

from tvm_sparse.frontends.loading import load

node = helper.make_node


def conv_net() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["in/x:0", "c1.w", "c1.b"], ["a"], name="conv/1", pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "c2.w"], ["c"], pads=[0, 0, 0, 0]),
        node("GlobalAveragePool", ["c"], ["d"]),
        node("Flatten", ["d"], ["e"]),
        node("Gemm", ["e", "fc.w", "fc.b"], ["out/y:0"], name="fc", transB=1),
    ]
    weights = {
        "c1.w": random(6, 3, 3, 3),
        "c1.b": random(6),
        "c2.w": random(5, 6, 1, 1),
        "fc.w": random(4, 5),
        "fc.b": random(4),
    }
    return onnx_model(nodes, weights, {"in/x:0": ("N", 3, 8, 8)}, ("out/y:0",))


def mlp(weight: np.ndarray | None = None, opset: int = 17) -> onnx.ModelProto:
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="first"),
        node("Add", ["b", "h"], ["y"]),
    ]
    weight = random(8, 5) if weight is None else weight
    return onnx_model(nodes, {"w": weight, "b": random(5)}, {"x": (3, 8)}, opset=opset)


def test_a_network_computes_what_onnx_runtime_computes():
    proto = conv_net()
    model = load(proto)
    assert check_canonical(model) == []
    x = random(2, 3, 8, 8, seed=1)
    assert_close(run_model(model, x)[0], run_onnx(proto, **{"in/x:0": x})[0])


def test_inputs_and_outputs_keep_the_users_names_and_symbols():
    model = load(conv_net())
    assert [(s.name, s.shape, s.dtype) for s in model.inputs] == [
        ("in/x:0", ("N", 3, 8, 8), "float32")
    ]
    assert [(s.name, s.shape) for s in model.outputs] == [("out/y:0", ("N", 4))]


def test_layers_are_named_by_node_else_by_output():
    layers = load(conv_net()).layer_names
    assert layers["c1_w"] == layers["c1_b"] == "conv/1"
    assert layers["c2_w"] == "c"
    assert layers["fc_w"] == "fc"


def test_a_weight_of_two_nodes_names_both_and_is_stored_once():
    nodes = [
        node("Transpose", ["w"], ["wt"], name="t"),
        node("MatMul", ["x", "wt"], ["h"], name="a"),
        node("MatMul", ["h", "wt"], ["y"], name="b"),
    ]
    model = load(onnx_model(nodes, {"w": random(8, 8)}, {"x": (3, 8)}))
    assert list(model.layer_names.values()) == ["a, b"]
    assert ops_of(model) == ["matmul", "matmul"]


def test_loading_leaves_the_users_proto_alone():
    proto = conv_net()
    before = proto.SerializeToString(deterministic=True)
    load(proto)
    assert proto.SerializeToString(deterministic=True) == before


def test_a_path_the_bytes_and_the_proto_give_the_same_model(tmp_path):
    proto = mlp()
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    digests = {load(source).digest() for source in (proto, str(path), path, path.read_bytes())}
    assert len(digests) == 1


def test_external_data_is_found_beside_the_model(tmp_path):
    proto = mlp()
    expected = load(proto).digest()
    path = tmp_path / "m.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert load(path).digest() == expected


@pytest.mark.parametrize("linear", [True, False])
def test_a_sparse_initializer_becomes_dense(linear):
    dense = np.zeros((8, 5), np.float32)
    dense[1, 2], dense[7, 0], dense[3, 4] = 1.5, -2, 3
    proto = mlp(dense)
    kept = [t for t in proto.graph.initializer if t.name != "w"]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    rows, columns = np.nonzero(dense)
    indices = rows * 5 + columns if linear else np.stack([rows, columns], axis=1)
    proto.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(dense[rows, columns], "w"),
            numpy_helper.from_array(indices.astype(np.int64), "w_indices"),
            dense.shape,
        )
    )
    np.testing.assert_array_equal(load(proto).params["w"], dense)


def test_constant_nodes_and_filled_shapes_are_weights():
    nodes = [
        node("ConstantOfShape", ["s"], ["w"], value=numpy_helper.from_array(np.float32([0.5]))),
        node("Constant", [], ["b"], value=numpy_helper.from_array(random(5))),
        node("MatMul", ["x", "w"], ["h"], name="mm"),
        node("Add", ["h", "b"], ["y"]),
    ]
    model = load(onnx_model(nodes, {"s": np.array([8, 5])}, {"x": (3, 8)}))
    assert check_canonical(model) == []
    assert model.params["w"].shape == (8, 5)
    assert model.layer_names["w"] == "mm"


def test_an_initializer_that_is_also_an_input_is_a_constant():
    proto = mlp()
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (8, 5)))
    assert [spec.name for spec in load(proto).inputs] == ["x"]


def test_shapes_fix_a_symbol_everywhere():
    nodes = [node("Add", ["a", "b"], ["y"])]
    proto = onnx_model(nodes, {}, {"a": ("N", 4), "b": ("N", 4)})
    model = load(proto, shapes={"a": (3, 4)})
    assert [spec.shape for spec in (*model.inputs, *model.outputs)] == [(3, 4)] * 3


def test_dimensions_without_a_name_are_independent():
    nodes = [node("Concat", ["a", "b"], ["y"], axis=0)]
    proto = onnx_model(nodes, {}, {"a": (None, 4), "b": (None, 4)})
    model = load(proto)
    assert model.inputs[0].shape[0] != model.inputs[1].shape[0]
    x, z = random(2, 4), random(3, 4)
    np.testing.assert_array_equal(run_model(model, x, z)[0], np.concatenate([x, z]))


def test_a_symbol_with_an_operator_in_its_name_is_one_symbol():
    proto = onnx_model([node("Relu", ["x"], ["y"])], {}, {"x": ("batch-size", 4)})
    model = load(proto)
    assert model.inputs[0].shape == model.outputs[0].shape == ("batch-size", 4)


def test_sum_is_a_chain_of_additions():
    nodes = [node("Sum", ["a", "b", "c"], ["y"])]
    proto = onnx_model(nodes, {}, {"a": (2, 4), "b": (2, 4), "c": (4,)})
    model = load(proto)
    assert ops_of(model) == ["add", "add"]
    a, b, c = random(2, 4), random(2, 4, seed=1), random(4, seed=2)
    assert_close(run_model(model, a, b, c)[0], a + b + c)


@pytest.mark.parametrize("op_type", ["Min", "Max", "Mean"])
def test_other_variadic_operators_are_pairwise_too(op_type):
    proto = onnx_model([node(op_type, ["a", "b"], ["y"])], {}, {"a": (2, 4), "b": (4,)})
    model = load(proto)
    assert "stack" not in ops_of(model)
    a, b = random(2, 4), random(4, seed=1)
    assert_close(run_model(model, a, b)[0], run_onnx(proto, a=a, b=b)[0])


@pytest.mark.parametrize("size", [3, 5])
def test_local_response_normalisation_pools_in_two_dimensions(size):
    nodes = [node("LRN", ["x"], ["y"], size=size, alpha=0.3, beta=0.75)]
    proto = onnx_model(nodes, {}, {"x": (2, 9, 4, 5)})
    model = load(proto)
    ops = ops_of(model)
    assert "nn.avg_pool2d" in ops
    assert not {"nn.avg_pool3d", "expand_dims", "squeeze"} & set(ops)
    x = random(2, 9, 4, 5)
    assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0])


def test_dropout_and_identity_are_gone():
    nodes = [
        node("Identity", ["w"], ["w2"]),
        node("MatMul", ["x", "w2"], ["h"], name="mm"),
        node("Dropout", ["h"], ["i"]),
        node("Identity", ["i"], ["j"]),
        node("Dropout", ["j"], ["y"]),
    ]
    model = load(onnx_model(nodes, {"w": random(8, 5)}, {"x": (3, 8)}))
    assert ops_of(model) == ["matmul"]
    assert model.layer_names == {"w": "mm"}


def test_scales_of_gemm_are_in_its_weights():
    nodes = [node("Gemm", ["x", "w", "b"], ["y"], alpha=0.5, beta=3.0, transB=1)]
    proto = onnx_model(nodes, {"w": random(5, 8), "b": random(5)}, {"x": (3, 8)})
    model = load(proto)
    assert ops_of(model) == ["matmul", "add"]
    x = random(3, 8, seed=1)
    assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0])


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("size", [7, 8])
def test_automatic_padding_is_written_out(mode, size):
    nodes = [node("Conv", ["x", "w"], ["y"], auto_pad=mode, strides=[2, 2])]
    proto = onnx_model(nodes, {"w": random(4, 3, 3, 3)}, {"x": (1, 3, size, size)})
    model = load(proto)
    assert ops_of(model) == ["nn.conv2d"]
    x = random(1, 3, size, size, seed=1)
    assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0])


def opset_net(opset: int) -> onnx.ModelProto:
    squeeze, clip, weights = node("Squeeze", ["c", "axes"], ["d"]), None, {}
    if opset < 13:
        squeeze = node("Squeeze", ["c"], ["d"], axes=[2, 3])
    if opset < 11:
        clip = node("Clip", ["a"], ["b"], min=0.0, max=6.0)
    else:
        clip = node("Clip", ["a", "lo", "hi"], ["b"])
        weights = {"lo": np.float32(0), "hi": np.float32(6)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        clip,
        node("GlobalAveragePool", ["b"], ["c"]),
        squeeze,
        node("Softmax", ["d"], ["y"], axis=1),
    ]
    weights["w"] = random(4, 3, 3, 3)
    if opset >= 13:
        weights["axes"] = np.array([2, 3])
    return onnx_model(nodes, weights, {"x": (2, 3, 8, 8)}, opset=opset)


@pytest.mark.parametrize("opset", [9, 10, 11, 12, 13, 15, 18, 21])
def test_opsets_from_nine_on_mean_the_same(opset):
    proto = opset_net(opset)
    model = load(proto)
    assert check_canonical(model) == []
    x = random(2, 3, 8, 8, seed=1)
    assert_close(run_model(model, x)[0], run_onnx(opset_net(13), x=x)[0])


def test_resize_reads_its_scales_while_importing():
    nodes = [node("Resize", ["x", "", "scales"], ["y"], mode="nearest")]
    scales = np.array([1, 1, 2, 2], np.float32)
    proto = onnx_model(nodes, {"scales": scales}, {"x": (1, 2, 4, 4)})
    x = random(1, 2, 4, 4)
    assert_close(run_model(load(proto), x)[0], run_onnx(proto, x=x)[0])


def test_shapes_computed_in_the_graph_are_resolved():
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Unsqueeze", ["n", "zero1"], ["n1"]),
        node("Concat", ["n1", "rest"], ["shape"], axis=0),
        node("Reshape", ["x", "shape"], ["r"]),
        node("MatMul", ["r", "w"], ["y"]),
    ]
    weights = {
        "zero": np.array(0),
        "zero1": np.array([0]),
        "rest": np.array([-1]),
        "w": random(12, 5),
    }
    proto = onnx_model(nodes, weights, {"x": ("N", 3, 4)})
    x = random(2, 3, 4, seed=1)
    assert_close(run_model(load(proto), x)[0], run_onnx(proto, x=x)[0])


def test_a_local_function_is_inlined():
    proto = onnx_model([node("Twice", ["x"], ["y"], domain="my")], {}, {"x": (2, 4)})
    proto.opset_import.append(helper.make_opsetid("my", 1))
    body = [node("Add", ["a", "a"], ["b"])]
    opset = [helper.make_opsetid("", 17)]
    proto.functions.append(helper.make_function("my", "Twice", ["a"], ["b"], body, opset))
    assert ops_of(load(proto)) == ["add"]


@pytest.mark.parametrize("attributes", [{}, {"alpha": 2.0}])
def test_an_operator_that_onnx_defines_by_others_is_written_out(attributes):
    proto = onnx_model([node("Celu", ["x"], ["y"], **attributes)], {}, {"x": (2, 4)})
    x = random(2, 4)
    assert_close(run_model(load(proto), x)[0], run_onnx(proto, x=x)[0])


def test_old_operators_with_attributes_in_place_of_inputs():
    nodes = [
        node("Pad", ["x"], ["a"], pads=[0, 0, 1, 1, 0, 0, 1, 1]),
        node("Slice", ["a"], ["b"], axes=[2], starts=[1], ends=[4]),
        node("Upsample", ["b", "s"], ["y"], mode="nearest"),
    ]
    scales = np.array([1, 1, 2, 2], np.float32)
    proto = onnx_model(nodes, {"s": scales}, {"x": (2, 3, 6, 6)}, opset=9)
    x = random(2, 3, 6, 6)
    assert_close(run_model(load(proto), x)[0], run_onnx(proto, x=x)[0])


def test_a_branch_with_a_constant_condition_is_taken():
    def branch(op_type: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
        return helper.make_graph([node(op_type, ["x"], ["r"])], op_type, [], [value])

    nodes = [
        node("If", ["c"], ["i"], then_branch=branch("Relu"), else_branch=branch("Neg")),
        node("Abs", ["i"], ["y"]),
    ]
    proto = onnx_model(nodes, {"c": np.array(False)}, {"x": (2, 4)})
    assert ops_of(load(proto)) == ["negative", "abs"]


def test_a_branch_keeps_its_weight_where_only_the_nonzeros_are_stored():
    value = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    nonzeros = numpy_helper.from_array(random(3), "w")
    places = numpy_helper.from_array(np.array([0, 5, 11]), "w_places")
    sparse = helper.make_sparse_tensor(nonzeros, places, [4, 3])
    graph = helper.make_graph(
        [node("MatMul", ["x", "w"], ["r"])], "b", [], [value], sparse_initializer=[sparse]
    )
    other = helper.make_graph([node("Neg", ["x"], ["r"])], "b", [], [value])
    nodes = [node("If", ["c"], ["y"], then_branch=graph, else_branch=other)]
    proto = onnx_model(nodes, {"c": np.array(True)}, {"x": (2, 4)})
    weight = np.zeros(12, np.float32)
    weight[[0, 5, 11]] = random(3)
    x = random(2, 4, seed=1)
    assert_close(run_model(load(proto), x)[0], x @ weight.reshape(4, 3))


@pytest.mark.parametrize(("columns", "operator"), [(1, "squeeze"), (4, "negative")])
def test_a_condition_on_a_known_shape_is_settled(columns: int, operator: str):
    value = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    squeezed, negated = node("Squeeze", ["x", "axis"], ["r"]), node("Neg", ["x"], ["r"])
    branches = {
        "then_branch": helper.make_graph([squeezed], "b", [], [value]),
        "else_branch": helper.make_graph([negated], "b", [], [value]),
    }
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "axis"], ["d"]),
        node("Equal", ["d", "axis"], ["c"]),
        node("If", ["c"], ["y"], **branches),
    ]
    proto = onnx_model(nodes, {"axis": np.array([1])}, {"x": (3, "n")})
    model = load(proto, shapes={"x": (3, columns)})
    assert ops_of(model) in ([operator], ["reshape"])
    assert model.notes == ()
    x = random(3, columns)
    assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0])


def branching(keepdims: int, opset: int) -> onnx.ModelProto:
    """Choose between two layers by the sign of the sum; each branch names its weight `w`."""

    def branch(order: list[str], seed: int) -> onnx.GraphProto:
        value = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
        weight = numpy_helper.from_array(random(4, 4, seed=seed), "w")
        nodes = [
            node("MatMul", ["x", "w"], ["m"], name=f"mm{seed}"),
            *(
                node(op, ["m" if op == order[0] else "i"], [name], name=f"{op}{seed}")
                for op, name in zip(order, ("i", "r"), strict=True)
            ),
        ]
        return helper.make_graph(nodes, "b", [], [value], [weight])

    nodes = [
        node("ReduceMax", ["x"], ["s"], keepdims=keepdims),
        node("Greater", ["s", "limit"], ["c"]),
        node(
            "If",
            ["c"],
            ["z"],
            name="choice",
            then_branch=branch(["Relu", "Neg"], 1),
            else_branch=branch(["Abs", "Exp"], 2),
        ),
        node("MatMul", ["z", "v"], ["y"], name="last"),
    ]
    weights = {"limit": np.float32(0), "v": random(4, 3)}
    return onnx_model(nodes, weights, {"x": ("n", 4)}, opset=opset)


@pytest.mark.parametrize(("keepdims", "opset"), [(0, 17), (1, 17), (0, 11)])
def test_a_branch_at_run_time_is_a_choice_between_computed_results(keepdims: int, opset: int):
    proto = branching(keepdims, opset)
    model = load(proto)
    assert check_canonical(model) == []
    assert sorted(model.layer_names.values()) == ["last", "mm1", "mm2"]
    assert model.notes == (
        "'choice' branches at run time: both branches are computed, and one result is taken",
    )
    for x in (random(3, 4), -np.abs(random(5, 4))):
        for got, wanted in zip(run_model(model, x), run_onnx(proto, x=x), strict=True):
            assert_close(got, wanted)


def test_branches_of_branches():
    def graph(nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        value = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
        return helper.make_graph(nodes, "b", [], [value])

    def choice(condition: str, result: str, then: list, other: list) -> onnx.NodeProto:
        branches = {"then_branch": graph(then), "else_branch": graph(other)}
        return node("If", [condition], [result], **branches)

    inner = choice("d", "r", [node("Exp", ["x"], ["r"])], [node("Neg", ["x"], ["r"])])
    nodes = [
        node("ReduceMax", ["x"], ["s"], keepdims=0),
        node("Greater", ["s", "zero"], ["c"]),
        node("Greater", ["s", "one"], ["d"]),
        choice("c", "y", [inner], [node("Identity", ["x"], ["r"])]),
    ]
    weights = {"zero": np.float32(0), "one": np.float32(1)}
    proto = onnx_model(nodes, weights, {"x": (4,)})
    model = load(proto)
    for shift in (-9, 0.5, 9):
        x = np.clip(random(4), -0.4, 0.4) + np.float32(shift)
        assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0])


def test_an_optional_input_is_one_that_is_given():
    value = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    given = [node("OptionalGetElement", ["b"], ["o"]), node("Add", ["x", "o"], ["r"])]
    branches = {
        "then_branch": helper.make_graph(given, "given", [], [value]),
        "else_branch": helper.make_graph([node("Neg", ["x"], ["r"])], "missing", [], [value]),
    }
    nodes = [node("OptionalHasElement", ["b"], ["c"]), node("If", ["c"], ["y"], **branches)]
    proto = onnx_model(nodes, {}, {"x": (2, 4), "b": (2, 4)}, opset=18)
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, (2, 4))
    proto.graph.input[1].type.CopyFrom(helper.make_optional_type_proto(tensor))
    model = load(proto)
    assert [spec.shape for spec in model.inputs] == [(2, 4), (2, 4)]
    assert ops_of(model) == ["add"]


@pytest.mark.parametrize(
    ("data", "asked"), [((3, 1), (3, 4)), ((3, 1), (1, 4)), ((3, 1), (2, 1, 6)), (("n", 4), (1, 1))]
)
def test_expanding_to_a_shape_that_comes_in_as_data(data: tuple, asked: tuple[int, ...]):
    proto = onnx_model([node("Expand", ["x", "shape"], ["y"])], {}, {"x": data, "shape": ()})
    shape = helper.make_tensor_type_proto(TensorProto.INT64, (len(asked),))
    proto.graph.input[1].type.CopyFrom(shape)
    x, sizes = random(3, data[1]), np.array(asked)
    got = run_model(load(proto), x, sizes)[0]
    np.testing.assert_array_equal(got, run_onnx(proto, x=x, shape=sizes)[0])


def test_a_constant_of_a_shape_that_comes_in_as_data():
    proto = onnx_model([node("ConstantOfShape", ["shape"], ["y"])], {}, {"shape": (3,)})
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    shape = np.array([2, 1, 4])
    got = run_model(load(proto), shape)[0]
    np.testing.assert_array_equal(got, np.zeros(shape, np.float32))


def test_an_empty_constant_is_no_weight():
    empty = np.zeros((3, 0), np.float32)
    model = load(
        onnx_model([node("Concat", ["x", "w"], ["y"], axis=1)], {"w": empty}, {"x": (3, 8)})
    )
    assert not model.params
    x = random(3, 8)
    np.testing.assert_array_equal(run_model(model, x)[0], x)


def test_quantised_weights_stay_integers():
    nodes = [
        node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=1),
        node("MatMul", ["x", "w"], ["y"], name="mm"),
    ]
    weights = {
        "q": np.arange(-20, 20, dtype=np.int8).reshape(8, 5),
        "s": np.full(5, 0.1, np.float32),
        "z": np.zeros(5, np.int8),
    }
    proto = onnx_model(nodes, weights, {"x": (3, 8)})
    model = load(proto)
    assert ops_of(model) == ["dequantize", "matmul"]
    assert check_canonical(model) == []
    x = random(3, 8)
    # Not ONNX Runtime: it quantises the activations of such a product as well.
    assert_close(run_model(model, x)[0], x @ (weights["q"] * np.float32(0.1)))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_load(dtype):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    proto = onnx_model(nodes, {"w": random(8, 5).astype(dtype)}, {"x": (3, 8)}, dtype=kind)
    model = load(proto)
    assert model.params["w"].dtype == dtype
    assert model.inputs[0].dtype == np.dtype(dtype).name


def test_several_outputs_come_in_order_even_if_one_is_a_weight_or_an_input():
    nodes = [node("Relu", ["x"], ["b"]), node("Neg", ["x"], ["a"])]
    proto = onnx_model(nodes, {"w": random(3)}, {"x": (2, 4)}, ("b", "a", "w", "x"))
    model = load(proto)
    assert [spec.name for spec in model.outputs] == ["b", "a", "w", "x"]
    x = random(2, 4)
    for actual, expected in zip(run_model(model, x), run_onnx(proto, x=x), strict=True):
        np.testing.assert_array_equal(actual, expected)
