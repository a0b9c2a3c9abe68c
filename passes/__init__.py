"""Relax and TIR passes, one a file, named by what they do."""

if __name__ != "tvm_sparse.passes":
    raise ImportError(
        "import tvm_sparse.passes; a second copy under the name 'passes' would not work"
    )
