"""No kernel of a whole module touches a byte outside of its buffers, the dense ones included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm_ffi
from attention_models import attention
from dense_support import target_of
from gated_models import gated_encoder
from guard_pages import PLACES, GuardedArray, build_scratch_guard, guard_scratch, run_in_child
from test_compile import inverted_residual, residual_block

import tvm_sparse as ts
from tvm_sparse import zoo

MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "mlp": lambda: zoo.mlp(batch=5, sizes=(150, 203, 71, 10)),
    "transformer": lambda: zoo.bert_encoder(layers=1, hidden=60, heads=3, ffn=110, seq=19),
    # Panels of two widths, with tokens that fill no vector.
    "uneven panels": lambda: zoo.bert_encoder(layers=1, hidden=60, heads=3, ffn=110, seq=77),
    "gated encoder": lambda: gated_encoder(
        layers=1, fused=True, rotary="behind turning", heads=3, depth=10, tokens=77
    ),
    "masked attention": lambda: attention(mask="shared pairs", tokens=50),
    "residual block": residual_block,
    "inverted residual": inverted_residual,
}


class Replay:
    """An instrument of TVM's virtual machine: repeats every kernel's call between guard pages."""

    def __init__(self) -> None:
        self.symbols: list[str] = []

    def __call__(self, func: Any, symbol: str, before: bool, _result: Any, *args: Any) -> None:
        tensors = all(isinstance(arg, tvm_ffi.Tensor) for arg in args)
        if before or symbol.startswith("vm.") or not args or not tensors:
            return
        print(f"kernel {symbol}", flush=True)
        arrays = [np.from_dlpack(arg) for arg in args]
        for place in PLACES:
            guarded = [GuardedArray(array, place) for array in arrays]
            guarded[-1].array.view(np.uint8)[...] = 0xFF
            func(*[tvm_ffi.from_dlpack(item.array) for item in guarded])
            for index, (item, array) in enumerate(zip(guarded, arrays, strict=True)):
                assert item.surroundings_are_intact(), f"{symbol} wrote around argument {index}"
                assert item.array.tobytes() == array.tobytes(), f"{symbol}: argument {index}"
        self.symbols.append(symbol)


def replay(name: str, mcpu: str, folder: str, scratch_guard: str) -> None:
    """Export a model, load it, run it on guarded inputs, and each of its kernels once more."""
    guard_scratch(scratch_guard)
    library = Path(folder) / "model.so"
    model = ts.prune(MODELS[name](), sparsity=0.8, scope="layer")
    ts.compile(model, target=mcpu, threads=2).export(library)
    module = ts.load_module(library)
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(spec.shape, np.float32) for spec in module.inputs]
    want = module._run(inputs)
    for place in PLACES:
        guarded = [GuardedArray(array, place) for array in inputs]
        for got, expected in zip(module._run([g.array for g in guarded]), want, strict=True):
            np.testing.assert_array_equal(got, expected)
        assert all(item.surroundings_are_intact() for item in guarded)
    instrument = Replay()
    module._run(inputs, instrument)
    assert set(module.manifest.kernels) <= set(instrument.symbols)
    print("end")


@pytest.mark.parametrize("lanes", [16, 8])
@pytest.mark.parametrize("name", list(MODELS))
def test_no_kernel_of_a_module_strays(name: str, lanes: int, tmp_path: Path) -> None:
    target = target_of(lanes)
    guard = build_scratch_guard(tmp_path)
    if guard is None:
        pytest.skip("no C compiler")
    mcpu = str(target.attrs["mcpu"])
    ending, lines = run_in_child("test_module_bounds", "replay", name, mcpu, tmp_path, guard)
    assert not ending and lines[-1] == "end", f"{lines[-1:]}: {ending}"
