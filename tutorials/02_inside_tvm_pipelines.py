"""Tutorial 2: the sparse pipeline inside TVM, for those who write ``tvm.compile`` themselves.

Run it as it stands: ``python tutorials/02_inside_tvm_pipelines.py``. It takes some seconds.
"""

import os

os.environ.setdefault("TVM_NUM_THREADS", "1")

import numpy as np
import tvm
from tvm import relax

import tvm_sparse as ts

# Nothing of this package is imported for what follows first: an entry point registers the pipeline
# "sparse" while TVM is imported. `import tvm_sparse` above is for the second half.
#
# A module of your own
# --------------------
# Two linear layers with a ReLU between them. The first weight is pruned to 90 % zeros; the second
# one is not pruned at all.

rng = np.random.default_rng(0)
W1 = rng.standard_normal((512, 512)).astype(np.float32) / 23
W1[np.abs(W1) < np.quantile(np.abs(W1), 0.9)] = 0
W2 = rng.standard_normal((512, 128)).astype(np.float32) / 23


def two_layers(first: relax.Expr, second: relax.Expr, params: list[relax.Var]) -> tvm.IRModule:
    """Build ``relu(x @ first) @ second``."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((128, 512), "float32"))
    with builder.function("main", [x, *params]):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, first))
            y = builder.emit(relax.op.nn.relu(y))
            y = builder.emit_output(relax.op.matmul(y, second))
        builder.emit_func_output(y)
    return builder.get()


X = rng.standard_normal((128, 512)).astype(np.float32)
expected = np.maximum(X @ W1, 0) @ W2


def run(executable: object) -> np.ndarray:
    """Run an executable on the virtual machine, as with any other one of TVM."""
    machine = relax.VirtualMachine(executable, tvm.cpu())
    # TVM's kernels want aligned data: `tvm.runtime.tensor` copies it to where it is.
    return machine["main"](tvm.runtime.tensor(X)).numpy()


def agrees(y: np.ndarray) -> bool:
    """Compare with NumPy, relative to the largest output."""
    return bool(np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max())


# One word in `tvm.compile`
# -------------------------
# The weights are constants of the module here. The pipeline finds the zeros, decides for each
# weight as `ts.plan` would, and does the rest of what TVM's default pipeline does.

target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
mod = two_layers(relax.const(W1), relax.const(W2), [])
executable = tvm.compile(mod, target, relax_pipeline="sparse")
assert agrees(run(executable))
print('tvm.compile(mod, target, relax_pipeline="sparse") agrees with NumPy')

# If you come from Relay
# ----------------------
# Relay left TVM in 2025 and Relax took its place. What used to read
#
#     lib = relay.build(mod, target=target, params=params)
#
# keeps its shape: free parameters in the module, their values by name, and an executable back.

first = relax.Var("first", relax.TensorType(W1.shape, "float32"))
second = relax.Var("second", relax.TensorType(W2.shape, "float32"))
free = two_layers(first, second, [first, second])
executable = ts.build(free, target, {"first": W1, "second": W2})
assert agrees(run(executable))
print("ts.build(mod, target, params) agrees with NumPy")

# What was done
# -------------
# An executable cannot tell. `ts.plan` says what the pipeline decides for a module and why, and
# `ts.compile` takes the same sources and returns a module with a report.

plan = ts.plan(mod, target=target)
print(plan)
module = ts.compile(mod, target=target, plan=plan)
print(module.report)
assert agrees(module(X))

print("done")
