"""What `package` puts beside a library for programs in C++; nothing here is Python."""

if __name__ != "tvm_sparse.deployment":
    raise ImportError(
        "import tvm_sparse.deployment; a second copy under the name 'deploy' would not work"
    )
