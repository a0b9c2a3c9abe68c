"""Tutorial 1: compile a pruned model, see what became of it, and run it anywhere.

Run it as it stands: ``python tutorials/01_compile_a_pruned_model.py``. It takes some seconds.
"""

import os
import tempfile
from pathlib import Path

# TVM reads this when its thread pool starts, so it stands before everything else.
os.environ.setdefault("TVM_NUM_THREADS", "1")

import numpy as np

import tvm_sparse as ts
from tvm_sparse import zoo

# A pruned model
# --------------
# You would bring your own ONNX file, pruned and retrained with the tool of your choice. Here a
# small transformer encoder is built on the spot and its smallest weights are set to zero: 90 % of
# them, layer by layer. `ts.prune` does no retraining; it is there for experiments like this one.

folder = Path(tempfile.mkdtemp(prefix="tvm-sparse-tutorial-"))
encoder = zoo.bert_encoder(layers=1, hidden=256, heads=4, ffn=1024, seq=64)
pruned = ts.prune(encoder, pattern="unstructured", sparsity=0.9, scope="layer")

# What is in it
# -------------
# `load` reads the model, and `inspect` looks at every weight of a matmul or convolution: how many
# zeros it has, and in which pattern they lie. The names are those of your model, here and in every
# report that follows. The report prints as a table; `report.to_json()` has the same for programs.

model = ts.load(pruned)
found = ts.inspect(model)
print(found)
assert all(layer.density < 0.11 for layer in found.layers)

# What will become of it
# ----------------------
# Zeros alone make nothing faster: an irregular kernel has to beat a very good dense one, on this
# layer's shape. So every layer gets a decision, and every decision has a reason, also when it is
# "stays dense". The plan is plain data. Keep it in a file, edit it, hand it to `compile`; or say
# what you want right away: `force={"*.output": "dense"}`, `forbid=["*query*"]`.

plan = ts.plan(model, target="native")
print(plan)
(folder / "plan.json").write_text(plan.to_json())

# Compile, and check
# ------------------
# Unless you say `check=False`, every rewritten layer and the whole model are compared with the
# dense model on random inputs before you get anything, against a bound that follows from the
# arithmetic. A module that fails is never handed over.

module = ts.compile(model, target="native", plan=plan)
print(module.report)

# Run it
# ------
# NumPy arrays (or anything with DLPack, such as PyTorch tensors) go in, NumPy arrays come out.

x = np.random.default_rng(0).standard_normal((1, 64, 256)).astype(np.float32)
y = module(x)
print("output", y.shape, y.dtype)

# Where the time goes, layer by layer:

print(module.profile(x))

# Take it elsewhere
# -----------------
# The exported library holds code, packed weights and its own report. It runs on TVM's small
# runtime: the machine that runs it needs neither the compiler nor the model.

library = folder / "encoder.so"
module.export(library)
loaded = ts.load_module(library)
assert np.array_equal(loaded(x), y)
dense_bytes = model.weight_bytes
print(f"{library.name}: {library.stat().st_size} bytes; its dense weights were {dense_bytes}")

# Is it faster?
# -------------
# Ask `tvm-sparse bench model.onnx`, which times the library against ONNX Runtime, OpenVINO and our
# own dense build in one run. The same steps as above, on the command line:
#
#     tvm-sparse inspect model.onnx
#     tvm-sparse compile model.onnx -o model.so --report report.json
#     tvm-sparse run model.so --input input=x.npy --output y.npz
#     tvm-sparse bench model.onnx

print("done")
