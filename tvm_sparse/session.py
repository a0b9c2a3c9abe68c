"""`InferenceSession`: ONNX Runtime's common calls, on a library that is compiled once and kept."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .cache import CachedLibrary, DamagedEntryError, LibraryCache
from .cache_key import key_here, model_digest
from .cpu_features import available_cores
from .deploy import load_module
from .dtypes import numpy_dtype
from .errors import InputError, LibraryError, ModelError, SparseError, TargetError
from .model import TensorSpec
from .report import Report
from .runtime import CompiledModule

# NumPy's names -> ONNX Runtime's.
_TYPE_NAMES = {"float32": "float", "float64": "double"}

_CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class NodeArg:
    """An input or output, as ONNX Runtime describes it.

    Attributes
    ----------
    name : str
    shape : list of int or str
        A symbolic dimension is its name.
    type : str
        For example ``tensor(float)``.
    """

    name: str
    shape: list[int | str]
    type: str


@dataclass(frozen=True)
class ModelMetadata:
    """What an ONNX file says of itself."""

    producer_name: str = ""
    graph_name: str = ""
    domain: str = ""
    description: str = ""
    graph_description: str = ""
    version: int = 0
    custom_metadata_map: Mapping[str, str] | None = None


class InferenceSession:
    """A model that is ready to run, in the shape of ``onnxruntime.InferenceSession``.

    The first session of a model compiles it, which takes from seconds to minutes, and keeps the
    library in a cache; later ones, in other processes too, load that. The library is found by
    everything that decides it: the model's bytes, the machine, threads, versions and options.

    Parameters
    ----------
    path_or_bytes : path or bytes
        An ONNX model.
    sess_options : object, optional
        Of ONNX Runtime, or anything like it: `intra_op_num_threads` counts, the rest has no
        meaning here.
    providers, provider_options : sequence, optional
        Accepted for ONNX Runtime's sake; others than the processor's are warned of.
    target : str or mapping
        What to compile for, as for `compile`.
    threads : int, optional
        By default those of `sess_options`, then TVM_NUM_THREADS, then all cores of this process.
    shapes : mapping of str to sequence of int, optional
        Fixes symbolic dimensions, which makes faster kernels.
    records, plan : path, optional
        As for `compile`.
    check : bool
        Compare with the dense model after compiling.
    cache : LibraryCache or path, optional
        Where libraries are kept; see `LibraryCache`.

    Attributes
    ----------
    module : CompiledModule
    from_cache : bool
        Whether nothing had to be compiled.

    Raises
    ------
    ModelError
        When the model cannot be read or compiled.
    CheckError
        When the compiled model disagrees with the dense one.
    TargetError
        When the target is not this machine's.

    Warns
    -----
    RuntimeWarning
        When a library of the cache is damaged, or none can be kept.
    """

    def __init__(
        self,
        path_or_bytes: str | os.PathLike[str] | bytes,
        sess_options: Any = None,
        providers: Sequence[Any] | None = None,
        provider_options: Sequence[Any] | None = None,
        *,
        target: str | Mapping[str, Any] = "native",
        threads: int | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        records: str | os.PathLike[str] | None = None,
        plan: str | os.PathLike[str] | None = None,
        check: bool = True,
        cache: LibraryCache | str | os.PathLike[str] | None = None,
    ) -> None:
        _warn_of_providers(providers)
        source = _model_source(path_or_bytes)
        self._threads = threads or _threads_of(sess_options)
        self._options = sess_options
        store = cache if isinstance(cache, LibraryCache) else LibraryCache(cache)

        def build() -> CompiledModule:
            from .compiler import compile as compile_model

            module = compile_model(
                source,
                target,
                None if plan is None else os.fspath(plan),
                records,
                check,
                threads=self._threads,
                shapes=shapes,
            )
            if module.refusal is not None:
                raise TargetError(module.refusal)
            return module

        def digest() -> str:
            key = key_here(
                _digest_of(source),
                target=target,
                threads=self._threads,
                shapes=shapes,
                records=records,
                plan=plan,
                options={"check": check},
            )
            return key.digest()

        self.module, self._metadata, self.from_cache = _Opening(
            source, store, self._threads, build, digest
        ).module()

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,
    ) -> list[np.ndarray]:
        """Run the model.

        Parameters
        ----------
        output_names : sequence of str or None
            Which outputs to return, in this order; None or nothing stands for all.
        input_feed : mapping of str to array
            Every input, of its type and shape; numbers and lists are taken as arrays.
        run_options
            Not used.

        Raises
        ------
        InputError
            When a name is unknown or missing, or an array does not fit.
        """
        known = [spec.name for spec in self.module.outputs]
        wanted = list(output_names or known)
        for name in wanted:
            if name not in known:
                raise InputError(
                    f"the model has no output '{name}'; its outputs are "
                    f"{', '.join(map(repr, known))}"
                )
        types = {spec.name: spec.dtype for spec in self.module.inputs}
        feed = {name: _as_array(value, types.get(name)) for name, value in input_feed.items()}
        results = self.module.run(feed)
        return [results[name] for name in wanted]

    def get_inputs(self) -> list[NodeArg]:
        """Describe the inputs, in the model's order."""
        return [_node_arg(spec) for spec in self.module.inputs]

    def get_outputs(self) -> list[NodeArg]:
        """Describe the outputs, in the model's order."""
        return [_node_arg(spec) for spec in self.module.outputs]

    def get_overridable_initializers(self) -> list[NodeArg]:
        """Return nothing: weights are part of the library."""
        return []

    def get_modelmeta(self) -> ModelMetadata:
        """Return what the ONNX file says of itself."""
        return self._metadata

    def get_providers(self) -> list[str]:
        """Name the processor's provider, whatever was asked for: nothing else stands behind it."""
        return [_CPU]

    def get_session_options(self) -> Any:
        """Return the options that were given."""
        return self._options

    @property
    def report(self) -> Report:
        """What became of every layer when the model was compiled."""
        return self.module.report


@dataclass(frozen=True)
class _Opening:
    """How a session gets its module: out of the cache, or compiled and then kept there."""

    source: str | bytes
    cache: LibraryCache
    threads: int
    build: Callable[[], CompiledModule]
    digest: Callable[[], str]

    def module(self) -> tuple[CompiledModule, ModelMetadata, bool]:
        """Return the module, the model's metadata, and whether it was there already."""
        if not self.cache.limit:
            return self.build(), _metadata(self.source), False
        key = self.digest()
        if why := self.cache.refusal():
            return self._unkept(self.build(), why)
        with self.cache.locked(key, alone=False):
            if found := self._load(key, say=False):
                return found
        # Another process may have compiled it while this one waited.
        with self.cache.locked(key, alone=True):
            return self._load(key, say=True) or self._make(key)

    def _load(self, key: str, *, say: bool) -> tuple[CompiledModule, ModelMetadata, bool] | None:
        try:
            found = self.cache.find(key)
            return None if found is None else self._open(found)
        except (DamagedEntryError, LibraryError) as error:
            if say:
                self._warn(f"the library kept for {self._title} is damaged: {error}; made anew")
            return None

    def _open(self, found: CachedLibrary) -> tuple[CompiledModule, ModelMetadata, bool]:
        module = load_module(found.path, self.threads)
        return module, ModelMetadata(**found.about.get("metadata", {})), True

    def _make(self, key: str) -> tuple[CompiledModule, ModelMetadata, bool]:
        module, metadata = self.build(), _metadata(self.source)
        if self.digest() != key:
            # A file was written to in the meantime: this library is neither's for certain.
            return self._unkept(module, "the model changed while it was compiled")
        about = {
            "model": self._title,
            "target": module.manifest.target.get("mcpu", module.manifest.target.get("kind")),
            "threads": self.threads,
            "metadata": vars(metadata),
        }
        try:
            self.cache.store(key, module.export, about)
        except (OSError, SparseError) as error:
            return self._unkept(module, str(error))
        return module, metadata, False

    def _unkept(
        self, module: CompiledModule, why: str
    ) -> tuple[CompiledModule, ModelMetadata, bool]:
        self._warn(f"the library of {self._title} is not kept in '{self.cache.folder}': {why}")
        return module, _metadata(self.source), False

    @property
    def _title(self) -> str:
        return "bytes" if isinstance(self.source, bytes) else f"'{Path(self.source).name}'"

    def _warn(self, sentence: str) -> None:
        warnings.warn(sentence, RuntimeWarning, stacklevel=5)


def _model_source(given: Any) -> str | bytes:
    if isinstance(given, bytes | bytearray | memoryview):
        return bytes(given)
    if isinstance(given, str | os.PathLike):
        return os.path.abspath(given)
    if hasattr(given, "SerializeToString"):
        return bytes(given.SerializeToString())
    raise ModelError(
        f"a session takes the path or the bytes of an ONNX model, not a {type(given).__name__}"
    )


def _digest_of(source: str | bytes) -> str:
    try:
        return model_digest(source)
    except FileNotFoundError:
        raise ModelError(f"there is no file '{source!s}'") from None
    except OSError as error:
        raise ModelError(f"'{source!s}' cannot be read: {error.strerror}") from None


def _threads_of(options: Any) -> int:
    asked = int(getattr(options, "intra_op_num_threads", 0) or 0)
    return asked or int(os.environ.get("TVM_NUM_THREADS") or 0) or len(available_cores())


def _warn_of_providers(providers: Sequence[Any] | None) -> None:
    names = [item if isinstance(item, str) else item[0] for item in providers or ()]
    others = [name for name in names if name != _CPU]
    if others:
        warnings.warn(
            f"'{others[0]}' is a part of ONNX Runtime and has no meaning here; what is compiled "
            "for is said with target=",
            RuntimeWarning,
            stacklevel=3,
        )


def _node_arg(spec: TensorSpec) -> NodeArg:
    kind = _TYPE_NAMES.get(spec.dtype, spec.dtype)
    return NodeArg(spec.name, list(spec.shape), f"tensor({kind})")


def _as_array(value: Any, dtype: str | None) -> Any:
    """Make an array of plain numbers; anything else is what a module takes or refuses."""
    plain = isinstance(value, bool | int | float | list | tuple)
    if not plain or dtype is None:
        return value
    try:
        return np.asarray(value, numpy_dtype(dtype))
    except (TypeError, ValueError) as error:
        raise InputError(f"an input cannot be read as {dtype}: {error}") from None


def _metadata(source: str | bytes) -> ModelMetadata:
    from .frontends.onnx_file import parse_onnx

    model = parse_onnx(source)
    return ModelMetadata(
        producer_name=model.producer_name,
        graph_name=model.graph.name,
        domain=model.domain,
        description=model.doc_string,
        graph_description=model.graph.doc_string,
        version=int(model.model_version),
        custom_metadata_map={entry.key: entry.value for entry in model.metadata_props},
    )
