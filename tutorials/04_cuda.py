"""Tutorial 4: compile a pruned model for a GPU, on any machine.

Run it as it stands: ``python tutorials/04_cuda.py``. It takes half a minute, and needs NVIDIA's
compiler (the CUDA 13 toolkit, or ``pip install 'tvm-sparse[cuda]'``); a GPU it only needs at the
very end, where it says so when there is none.
"""

import tempfile
from pathlib import Path

import numpy as np

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.cuda_toolkit import find_nvcc, has_gpu
from tvm_sparse.formats import FORMATS

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
# is decided by a roofline: tensor cores, shared memory, instructions and bytes, for each sparse
# kernel at each of its configurations and for TVM's own dense one. With few tokens there is less to
# win: a GPU does not wait for work that only some of its multiprocessors have.

plan = ts.plan(model, target="cuda-sm80")
print(plan)

few = ts.prune(zoo.bert_encoder(layers=1, seq=128), sparsity=0.9, scope="layer")
print(ts.plan(few, target="cuda-sm80").decisions[0].reason)

# These zeros lie anywhere, and still sparse tensor cores take them: a tile of rows lists the
# columns that it needs in an order in which no row has more nonzeros in a group than they can
# multiply. Of float16 that is two of four, of float32 one of two. What a tile lists, of 768:

decision = plan.decisions[0]
weight = next(value for value in ts.load(model).params.values() if value.shape == (768, 768))
packed = FORMATS[decision.format].pack(weight.T, decision.config)
chunks = np.diff(packed.arrays["sparse_begins"])
print("columns listed by the tiles:", chunks * decision.config["kb"])

# The kernel
# ----------
# A block of threads takes a tile of rows of the weight for a tile of tokens. Chunks of the list
# come by asynchronous copies, activations gathered by it, while the chunk before is multiplied.
# These are the tensor cores' instructions, as nvcc sees them; float32 is multiplied in three
# products of numbers split in two.

module = ts.compile(model, target="cuda-sm80", plan=plan)
assert module.cuda_source is not None
lines = [line.strip() for line in module.cuda_source.splitlines() if "(&(" in line]
first = next(i for i, line in enumerate(lines) if line.startswith("sparse_split"))
print("\n".join(line[:100] for line in lines[first : first + 8]))

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
