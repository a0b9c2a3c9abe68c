"""Tutorial 4: compile a pruned model for a GPU, on any machine.

Run it as it stands: ``python tutorials/04_cuda.py``. It takes half a minute, and needs NVIDIA's
compiler (the CUDA 13 toolkit) or NVRTC (``pip install 'tvm-sparse[cuda]'``); a GPU it only needs at
the very end, where it says so when there is none.
"""

import re
import tempfile
from pathlib import Path

import numpy as np

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.cuda_toolkit import find_nvcc, has_gpu

if find_nvcc() is None:
    print("this tutorial needs NVIDIA's compiler nvcc, and there is none here")
    print("done")
    raise SystemExit

# A pruned model
# --------------
# One layer of a transformer, 4,096 tokens, nine weights in ten zero. Pruned models of your own come
# from `ts.load("model.onnx")`.

model = ts.prune(zoo.bert_encoder(layers=1, seq=512, batch=8), sparsity=0.9, scope="layer")

# The plan
# --------
# Targets are `cuda-sm80`, `cuda-sm90` and their like, or a TVM target as a dictionary. Every layer
# is decided by a roofline: multiply-adds, shared memory, instructions and bytes, for the sparse
# kernel at each of its configurations and for TVM's own dense one. With few tokens there is less to
# win: a GPU does not wait for work that only some of its multiprocessors have.

plan = ts.plan(model, target="cuda-sm80")
print(plan)

few = ts.prune(zoo.bert_encoder(layers=1, seq=128), sparsity=0.9, scope="layer")
print(ts.plan(few, target="cuda-sm80").decisions[0].reason)

# The kernel
# ----------
# A block of threads takes a tile of rows of the weight for a tile of tokens. It brings the tokens
# and the nonzeros of a block of columns to shared memory; then every warp walks the nonzeros of its
# rows, each lane summing up some tokens. This is the loop over a row's nonzeros, as nvcc sees it:

module = ts.compile(model, target="cuda-sm80", plan=plan)
assert module.cuda_source is not None
kernel = module.cuda_source[module.cuda_source.index("row_tiles_matmul_1_kernel") :]
loop = re.search(
    r"( *for \(int v_\d+ = 0; v_\d+ < \(_ptr_\d+\[0\] - .*?\n    \})", kernel, re.DOTALL
)
assert loop is not None
print("\n".join(loop.group(1).splitlines()[:24]))

# A library for the GPU's machine
# -------------------------------
# It holds a fat binary: code for this architecture, and PTX for later ones. No compiler is needed
# where it runs, only TVM's runtime and the driver.

folder = Path(tempfile.mkdtemp())
module.export(folder / "model.so")
print(f"model.so: {(folder / 'model.so').stat().st_size / 2**20:.1f} MiB")

# Running it
# ----------

if has_gpu():
    loaded = ts.load_module(folder / "model.so")
    x = np.random.default_rng(0).standard_normal(loaded.inputs[0].shape).astype(np.float32)
    reference = ts.compile(model, target="native", check=False)(x)
    y = loaded(x)
    print(f"largest difference from the processor: {np.abs(y - reference).max():.1e}")
else:
    try:
        ts.load_module(folder / "model.so")
    except ts.SparseError as error:
        print(error)

print("done")
