"""Files made to do harm: each is refused in words that say what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import fuzz_onnx_models as models
import numpy as np
import onnx
import pytest
from fuzz_mutations import Files
from fuzz_parsers import PARSERS
from fuzz_reader import Reader
from onnx import TensorProto, helper, numpy_helper


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    running = Reader(tmp_path_factory.mktemp("cases"))
    yield running
    running.close()


def edited(make: Callable[[], onnx.ModelProto], change: Callable[[onnx.ModelProto], Any]) -> Files:
    model = make()
    change(model)
    return {"model.onnx": model.SerializeToString()}


def weight(change: Callable[[onnx.TensorProto], Any]) -> Files:
    return edited(models.layers, lambda model: change(model.graph.initializer[0]))


def external(**entries: str) -> Files:
    files = models.external()
    model = onnx.ModelProto.FromString(files["model.onnx"])
    for entry in model.graph.initializer[0].external_data:
        entry.value = entries.get(entry.key, entry.value)
    return {**files, "model.onnx": model.SerializeToString()}


def cycle(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Add", ["x", "q"], ["p"]))
    model.graph.node.insert(1, helper.make_node("Relu", ["p"], ["q"]))


def itself(model: onnx.ModelProto) -> None:
    function = model.functions[0]
    function.node[0].CopyFrom(helper.make_node("Twice", ["a"], ["b"], domain="local"))
    function.opset_import.append(helper.make_opsetid("local", 1))


def fill(*shape: int) -> Files:
    size = np.array(shape, np.int64)

    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "size")
        tensor.CopyFrom(numpy_helper.from_array(size, "size"))

    return edited(models.known_branch, change)


def sparse(dims: list[int], indices: list[int]) -> Files:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.sparse_initializer[0]
        tensor.dims[:] = dims
        places = numpy_helper.from_array(np.array(indices, np.int64), "w_indices")
        tensor.indices.CopyFrom(places)

    return edited(models.sparse_weight, change)


def not_utf8() -> Files:
    [data] = edited(models.layers, lambda model: None).values()
    # The name of a node, in a place that the file's lengths do not depend on.
    return {"model.onnx": data.replace(b"n_a", b"n\xff\xfe")}


def operator(op: str, domain: str = "") -> Files:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type, model.graph.node[0].domain = op, domain

    return edited(models.layers, change)


def deep_branches(depth: int) -> Files:
    out = [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)]
    inner = helper.make_graph([helper.make_node("Relu", ["x"], ["t"])], "g", [], out)
    other = inner
    for _ in range(depth):
        node = helper.make_node("If", ["c"], ["t"], then_branch=inner, else_branch=other)
        inner = helper.make_graph([node], "g", [], out)

    def change(model: onnx.ModelProto) -> None:
        model.graph.node[2].attribute[0].g.CopyFrom(inner)

    return edited(models.branches, change)


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        raise_it = "raise SystemExit('unpickled')"
        return (exec, (raise_it,))


def array(value: Any, **options: Any) -> Files:
    buffer = BytesIO()
    np.save(buffer, value, **options)
    return {"x.npy": buffer.getvalue()}


def header(shape: str) -> Files:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return {"x.npy": b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text}


def record_line(line: bytes) -> Files:
    return {"records.jsonl": line + b"\n" + PARSERS["records"].seeds()[0]["records.jsonl"]}


def library(place: int, *values: int) -> Files:
    data = bytearray(PARSERS["library"].seeds()[1]["model.so"])
    data[place : place + len(values)] = bytes(values)
    return {"model.so": bytes(data)}


def header_only(text: bytes) -> Files:
    return {"one.safetensors": len(text).to_bytes(8, "little") + text}


def removed(name: str) -> Callable[[onnx.ModelProto], None]:
    """Take the operands of the node that makes a value."""

    def change(model: onnx.ModelProto) -> None:
        [node] = [node for node in model.graph.node if name in node.output]
        del node.input[:]

    return change


def only_opset(version: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return change


# What is read, the files, and words of the refusal; none where the file may be read.
CASES: dict[str, tuple[str, Files, str]] = {
    # External data.
    "up and out": ("model", external(location="../weights.bin"), "outside the model's folder"),
    "in and out": ("model", external(location="a/../../weights.bin"), "outside the model's folder"),
    "an absolute path": ("model", external(location="/etc/passwd"), "outside the model's folder"),
    "a zero in a path": ("model", external(location="a\0b"), "outside the model's folder"),
    "no path": ("model", external(location=""), "is no file"),
    "a path too long": ("model", external(location="a" * 5000), "is missing"),
    "behind the end": ("model", external(offset="1000000"), "ends within the weight 'w'"),
    "before the start": ("model", external(offset="-8"), "no number as its offset"),
    "words for a number": ("model", external(length="many"), "no number as its length"),
    "up and out, to prune": ("model to prune", external(location="../weights.bin"), "cannot read"),
    # What files claim.
    "a huge weight": ("model", weight(lambda t: t.dims.append(2**60)), "more than this machine's"),
    "sizes that overflow": (
        "model",
        weight(lambda t: t.dims.__setitem__(slice(None), [2**32, 2**32])),
        "more than this machine's memory",
    ),
    "a negative size": ("model", weight(lambda t: t.dims.append(-1)), "has a negative size"),
    "too few bytes": (
        "model",
        weight(lambda t: setattr(t, "raw_data", t.raw_data[:-1])),
        r"does not hold the \[4, 3\] elements",
    ),
    "too many bytes": (
        "model",
        weight(lambda t: setattr(t, "raw_data", t.raw_data * 2)),
        r"does not hold the \[4, 3\] elements",
    ),
    "an unknown type": ("model", weight(lambda t: setattr(t, "data_type", 999)), "not known"),
    "a huge constant": ("model", fill(2**30, 2**30), "more than this machine's memory holds"),
    "a negative constant": ("model", fill(-1, 4), "has a negative size"),
    "a huge sparse weight": ("model", sparse([2**30, 2**30], [0, 1, 2]), "more than this machine"),
    "indices out of range": ("model", sparse([4, 3], [0, 1, 12]), "indices that do not fit"),
    "negative indices": ("model", sparse([4, 3], [-1, 1, 2]), "indices that do not fit"),
    # Graphs.
    "a cycle": ("model", edited(models.layers, cycle), "reads 'q', which nothing computes first"),
    "a value twice": (
        "model",
        edited(models.layers, lambda m: m.graph.node.append(m.graph.node[0])),
        "two nodes of 'model.onnx' compute 'a'",
    ),
    "a function of itself": ("model", edited(models.function, itself), "'Twice' .* calls itself"),
    "no operands": ("model", edited(models.layers, removed("a")), "lacks an operand"),
    "no branches": (
        "model",
        edited(models.branches, lambda m: m.graph.node[2].ClearField("attribute")),
        "lacks the attribute",
    ),
    "an attribute of another kind": (
        "model",
        edited(
            models.layers, lambda m: m.graph.node[4].attribute.append(helper.make_attribute("a", 1))
        ),
        "",
    ),
    "a number for a text": (
        "model",
        edited(
            models.convolution,
            lambda m: m.graph.node[0].attribute[0].CopyFrom(helper.make_attribute("auto_pad", 1)),
        ),
        "'auto_pad' .* value of the wrong kind",
    ),
    "no graph": ("model", edited(models.layers, lambda m: m.ClearField("graph")), "no graph"),
    "no outputs": (
        "model",
        edited(models.layers, lambda m: m.graph.ClearField("output")),
        "no outputs",
    ),
    "branches within branches": ("model", deep_branches(20), ""),
    "a name that is no text": ("model", not_utf8(), "a name that is not UTF-8"),
    "an unknown operator": ("model", operator("Frobnicate"), "Frobnicate .* is not supported"),
    "an unknown domain": ("model", operator("Gelu", "nowhere"), "nowhere.* is not supported"),
    "a loop": ("model", edited(models.loop, lambda m: None), "repeats a part of the graph"),
    "opset 0": ("model", edited(models.layers, only_opset(0)), ""),
    "opset -1": ("model", edited(models.layers, only_opset(-1)), ""),
    "opset 10^6": ("model", edited(models.layers, only_opset(10**6)), "opset 1000000"),
    # Arrays.
    "a pickled array": (
        "array",
        array(np.array([Bomb()], dtype=object), allow_pickle=True),
        "no whole .npy or .npz file of numbers",
    ),
    "a huge array": ("array", header("(1152921504606846976,)"), "no whole .npy"),
    "brackets in a header": ("array", header("(" * 9000), "no whole .npy"),
    "a call in a header": ("array", header("__import__('os').abort()"), "no whole .npy"),
    # Text files.
    "a huge matrix": ("matrix", {"m.smtx": b"1, 1152921504606846976, 0\n0 0\n"}, "more than this"),
    "brackets in a record": ("records", record_line(b"[" * 10**5), ""),
    "digits in a record": ("records", record_line(b"1" * 10**5), ""),
    "brackets in a plan": ("plan", {"plan.json": b'{"a": ' + b"[" * 10**5}, "nested too deeply"),
    "brackets that close": (
        "plan",
        {"plan.json": b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}"},
        "nested too deeply",
    ),
    "half a character": ("plan", {"plan.json": b'{"version": 1, "\\ud800": 1}'}, "not UTF-8"),
    "a package that leads out": (
        "package",
        {
            "manifest.json": PARSERS["package"]
            .seeds()[0]["manifest.json"]
            .replace(b'"load.py"', b'"../load.py"')
        },
        "would lie outside the folder",
    ),
    "an index that leads out": (
        "checkpoint",
        {"model.safetensors.index.json": b'{"weight_map": {"w": "../w.safetensors"}}'},
        "outside its folder",
    ),
    "a header that is too long": (
        "checkpoint",
        {"one.safetensors": (2**60).to_bytes(8, "little") + b"{}"},
        "no whole safetensors file",
    ),
    "a huge tensor": (
        "checkpoint",
        header_only(
            b'{"w": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 0]}}'
        ),
        "no whole safetensors file",
    ),
    # Targets.
    "no such GPU": ("target", {"target": b"cuda-sm70"}, "unknown target 'cuda-sm70'"),
    "a GPU without a number": (
        "target",
        {"target": b'{"kind": "cuda", "arch": "sm_"}'},
        "written as sm_80",
    ),
    "a GPU that is too old": ("target", {"target": b'{"kind": "cuda", "arch": "sm_70"}'}, "8.0"),
    # Libraries.
    "random bytes": ("library", {"model.so": bytes(range(256)) * 8}, "is not a shared library"),
    "nothing": ("library", {"model.so": b""}, "is not a shared library"),
    "half a header": ("library", {"model.so": b"\x7fELF\x02\x01\x01"}, "is truncated"),
    "an executable": ("library", library(16, 2), "another kind of ELF file"),
    "a 32-bit library": ("library", library(4, 1), "is not a 64-bit little-endian library"),
    "a library for Arm": ("library", library(18, 0xB7), "is for aarch64 processors"),
    "a segment behind the end": ("library", library(64 + 32, 0, 0, 16), "is truncated"),
    "segments of no size": ("library", library(54, 0), "is damaged"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_made_to_do_harm_is_refused_in_words(reader: Reader, name: str) -> None:
    parser, files, words = CASES[name]
    if parser == "checkpoint":
        pytest.importorskip("safetensors", reason="needs safetensors")
    answer = reader.read(parser, files)
    if words:
        assert answer["verdict"] == "refused", answer
        assert re.search(words, answer["text"]), answer["text"]
    else:
        assert answer["verdict"] in ("read", "refused"), answer
