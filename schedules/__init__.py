"""Kernel templates in TensorIR, by target."""

if __name__ != "tvm_sparse.schedules":
    raise ImportError(
        "import tvm_sparse.schedules; a second copy under the name 'schedules' would not work"
    )
