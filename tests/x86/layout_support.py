"""Shared by the tests of layouts: which kernels a network becomes, and whether it agrees."""

from __future__ import annotations

import re

import numpy as np
import onnxruntime
from tvm_sparse.passes.collect_weights import collect_weights
from tvm_sparse.passes.rewrite_main import bindings_of, call_of

import tvm_sparse as ts
from tvm_sparse.pipeline import lower_model
from tvm_sparse.targets import machine_of, resolve_target

TARGET = "x86-64-v3"
MACHINE = machine_of(resolve_target(TARGET), 1)


def kernels_of(proto):
    """Kernels in the order of their calls, without their numbers."""
    model = ts.load(proto)
    plan = ts.plan(model, TARGET, threads=1)
    mod = lower_model(model, collect_weights(model), plan, MACHINE).mod
    calls = [b.value for b in bindings_of(mod["main"]) if call_of(b.value, "call_tir")]
    return [re.sub(r"_?\d+$", "", call.args[0].name_hint) for call in calls]


def agrees(proto, seed=0):
    """Compare with ONNX Runtime, and return the kernels that ran.

    Weights are packed as sparse ones, whatever they hold: small dense layers take rows.
    """
    plan = ts.plan(proto, "native", threads=1, force={"*": "sliced_ell"})
    module = ts.compile(proto, "native", plan=plan, threads=1)
    rng = np.random.default_rng(seed)
    feed = {i.name: rng.standard_normal(i.shape).astype("float32") for i in module.inputs}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    got = module.run(feed)
    for output, want in zip(session.get_outputs(), session.run(None, feed), strict=True):
        scale = np.abs(want).max()
        np.testing.assert_allclose(got[output.name], want, rtol=0, atol=3e-5 * scale)
    return [row.symbol for row in module.profile(*feed.values()).kernels]
