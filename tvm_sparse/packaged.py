"""Run a package: a model's library on the runtime that lies beside it.

This module is the root of `load.py` in every package, which holds it and what it needs of this one:
Python with numpy and apache-tvm-ffi can run that, without tvm_sparse and without TVM.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .cuda_toolkit import load_cuda_library
from .device import CUDA, device_kind
from .errors import LibraryError
from .opening import check_file, check_processor, open_library
from .package_manifest import MANIFEST, Verify, read_package_manifest, verify_files
from .runtime import Runner, load_runtime_from

# Of which the runtime in a package wants exactly the version that it was linked with.
FFI_PACKAGE = "apache-tvm-ffi"

CUDA_RUNTIME = "libtvm_runtime_cuda.so"


def load(
    folder: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    verify: Verify = False,
    *,
    cpus: Sequence[int] | None = None,
    instances: int | None = None,
) -> Runner:
    """Load the model of a package.

    Loading a library runs its code: load packages of authors whom you trust.

    Parameters
    ----------
    folder : path, optional
        The package; by default the folder that this file is in.
    threads : int, optional
        Threads to run on; by default TVM_NUM_THREADS, then what the model was compiled for.
    verify : bool, str or path
        Refuses files that were changed before any of them is loaded. True compares them with
        manifest.json in the folder; a path names another manifest to trust. A SHA-256 in
        hexadecimal is that of manifest.json, which has those of all files in it.
    cpus : sequence of int, optional
        The cores to run on; see `Runner`.
    instances : int, optional
        Calls that run at the same time, from several threads; see `Runner`.

    Returns
    -------
    Runner
        Called with arrays, or by names with `run`; `inputs` and `outputs` say what it takes and
        gives.

    Raises
    ------
    LibraryError
        When the folder is no package, a file of it is missing or was changed, or another version of
        apache-tvm-ffi is installed.
    TargetError
        When this machine lacks instructions, or a GPU, that the model was compiled for.
    """
    place = Path(os.path.abspath(Path(__file__).parent if folder is None else folder))
    verify_files(place, verify)
    manifest = read_package_manifest(place / MANIFEST)
    file, model = place / manifest.library, manifest.model
    check_file(file)
    check_processor(file, model)
    _check_ffi(manifest.versions.get(FFI_PACKAGE, ""))
    load_runtime_from(place)
    if device_kind(model.target) == CUDA:
        load_cuda_library(place / CUDA_RUNTIME)
    return open_library(
        file,
        model,
        lambda library: Runner(library, model, threads, cpus=cpus, instances=instances),
    )


def _check_ffi(wanted: str) -> None:
    import tvm_ffi

    if tvm_ffi.__version__ != wanted:
        raise LibraryError(
            f"the package was made for {FFI_PACKAGE} {wanted}, and {tvm_ffi.__version__} is "
            f"installed: pip install {FFI_PACKAGE}=={wanted}"
        )
