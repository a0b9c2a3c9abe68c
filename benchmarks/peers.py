"""Dense peers on a model of one operator: ONNX Runtime, OpenVINO, and OpenBLAS for AVX2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnx
from bars import zeros
from cases import Case, MatmulCase
from onnx import TensorProto, helper, numpy_helper
from timing import Call

# In whose float32 time speed-ups are expressed: the faster one.
FLOAT32 = ("onnxruntime", "openvino f32", "openblas")
LOW_PRECISION = ("openvino default",)


@dataclass(frozen=True)
class Peer:
    """A prepared call, one that does next to nothing by the same way, and the output."""

    call: Call
    nothing: Call
    output: Callable[[], np.ndarray]


def one_operator(case: Case, weight: np.ndarray, shape: Sequence[int]) -> onnx.ModelProto:
    """Return a model of one MatMul or Conv with a constant weight."""
    if isinstance(case, MatmulCase):
        constant = np.ascontiguousarray(weight.T)
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        out: list[int] = [case.n, case.m]
    else:
        constant, g = weight, case.geometry
        node = helper.make_node(
            "Conv",
            ["x", "w"],
            ["y"],
            kernel_shape=list(g.kernel),
            strides=list(g.strides),
            pads=list(g.padding),
        )
        out = [case.batch, g.out_channels, g.out_height, g.out_width]
    return _model(node, shape, out, [numpy_helper.from_array(constant, "w")])


def _model(
    node: onnx.NodeProto, x: Sequence[int], y: Sequence[int], constants: Sequence[TensorProto] = ()
) -> onnx.ModelProto:
    graph = helper.make_graph(
        [node],
        "one_operator",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(y))],
        list(constants),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@lru_cache
def _tiny() -> bytes:
    return _model(helper.make_node("Relu", ["x"], ["y"]), [1], [1]).SerializeToString()


def dense_peers(
    case: Case, weight: np.ndarray, x: np.ndarray, threads: int, *, only_float32: bool = False
) -> dict[str, Peer]:
    """Prepare every installed peer on a model of one operator."""
    model = one_operator(case, weight, x.shape).SerializeToString()
    return peers_of(model, x, threads, only_float32=only_float32)


def peers_of(
    model: bytes, x: np.ndarray, threads: int, *, only_float32: bool = False
) -> dict[str, Peer]:
    """Prepare every installed peer on a model whose input is "x", and whose output "y"."""
    found: dict[str, Peer] = {}
    if find_spec("onnxruntime"):
        found["onnxruntime"] = _onnxruntime(model, x, threads)
    if find_spec("openvino"):
        found["openvino f32"] = _openvino(model, x, threads, "f32")
        if not only_float32:
            found["openvino default"] = _openvino(model, x, threads, None)
    return found


def openblas(case: MatmulCase, weight: np.ndarray, x: np.ndarray) -> Peer:
    """Multiply by NumPy's BLAS, which an environment variable keeps to AVX2."""
    right, y = np.ascontiguousarray(weight.T), zeros((case.n, case.m))
    one = np.ones((1, 1), np.float32)
    return Peer(
        partial(np.matmul, x, right, out=y), partial(np.matmul, one, one, out=one), lambda: y
    )


def _onnxruntime(model: bytes, x: np.ndarray, threads: int) -> Peer:
    def bound(model: bytes, x: np.ndarray) -> tuple[Call, Any]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Idle threads that spin slow the other systems down.
        for pool in ("intra", "inter"):
            options.add_session_config_entry(f"session.{pool}_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        shape = session.get_outputs()[0].shape
        y = onnxruntime.OrtValue.ortvalue_from_numpy(zeros(tuple(shape)))
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
        binding.bind_ortvalue_output("y", y)
        return partial(session.run_with_iobinding, binding), y

    call, y = bound(model, x)
    nothing, _ = bound(_tiny(), zeros((1,)))
    return Peer(call, nothing, lambda: np.array(y.numpy()))


def _openvino(model: bytes, x: np.ndarray, threads: int, precision: str | None) -> Peer:
    def request(model: bytes, x: np.ndarray) -> Any:
        import openvino

        core = openvino.Core()
        options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # The process is pinned already; OpenVINO's own pinning would move it.
            "ENABLE_CPU_PINNING": False,
        }
        if precision:
            options["INFERENCE_PRECISION_HINT"] = precision
        compiled = core.compile_model(core.read_model(model), "CPU", options)
        made = compiled.create_infer_request()
        made.set_input_tensor(openvino.Tensor(x, shared_memory=True))
        return made

    made, tiny = request(model, x), request(_tiny(), zeros((1,)))
    return Peer(made.infer, tiny.infer, lambda: np.array(made.get_output_tensor().data))


def best_float32(times: Mapping[str, float]) -> float | None:
    """Return the faster float32 peer's time."""
    return min((times[name] for name in FLOAT32 if name in times), default=None)
