"""Libraries that `cuda_run.py` times beside our kernels: through PyTorch, else through CuPy.

A peer may do its work in several ways; the fastest one counts. What a weight or activations must
be turned into for a way is done beforehand and costs the peer nothing, but for the lowering of
convolutions, which a network has to do for every image.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda_cases import Case

from tvm_sparse.workload import Conv2dGeometry

PEERS = ("cublas", "cusparse", "cusparselt", "cudnn")


@dataclass(frozen=True)
class Way:
    """One way in which a peer computes a layer.

    Attributes
    ----------
    calls : sequence of callable
        The same work on buffers of their own; each returns its result.
    read : callable
        Turns a result into a NumPy array of the layer's shape.
    """

    name: str
    calls: Sequence[Callable[[], Any]]
    read: Callable[[Any], np.ndarray]


class MissingPeerError(Exception):
    """A peer that is not there or does not do this, and why."""


class TorchPeers:
    """Peers through PyTorch.

    Parameters
    ----------
    weight : numpy.ndarray
        As `Case.weight` draws it.
    activations : sequence
        Tensors with DLPack, one for each set of buffers; the weight goes where they are.
    """

    def __init__(self, case: Case, weight: np.ndarray, activations: Sequence[Any]) -> None:
        self.torch = importlib.import_module("torch")
        self.case = case
        self.x = [self.torch.from_dlpack(tensor) for tensor in activations]
        first = self.torch.from_numpy(np.ascontiguousarray(weight)).to(self.x[0].device)
        self.weights = [first.clone() for _ in self.x]
        self.is_conv = isinstance(case.geometry, Conv2dGeometry)

    def ways(self, peer: str) -> dict[str, list[Way]]:
        """Return the ways of a peer, by the name that results stand under.

        Raises
        ------
        MissingPeerError
            When it does not compute such a layer.
        """
        return {
            "cublas": self._cublas,
            "cusparse": self._cusparse,
            "cusparselt": self._cusparselt,
            "cudnn": self._cudnn,
        }[peer]()

    def _cublas(self) -> dict[str, list[Way]]:
        torch = self.torch
        if self.is_conv:
            return {"cublas": [self._lowered()]}
        turned = [w.t().contiguous() for w in self.weights]
        out = [x.new_empty(self.case.shapes[1]) for x in self.x]
        sets = list(zip(self.x, self.weights, turned, out, strict=True))
        return {
            "cublas": [
                Way(
                    "weight as it is",
                    [_call(torch.matmul, x, w.t(), out=y) for x, w, _, y in sets],
                    _host,
                ),
                Way(
                    "weight transposed",
                    [_call(torch.matmul, x, t, out=y) for x, _, t, y in sets],
                    _host,
                ),
            ]
        }

    def _lower(self, x: Any) -> Any:
        """Write the window of every pixel as a column: [images, inputs x taps, pixels]."""
        g = self.case.geometry
        if g.kernel == (1, 1) and g.strides == (1, 1):
            return x.flatten(2)
        if g.kernel == (1, 1):
            return x[:, :, :: g.strides[0], :: g.strides[1]].flatten(2)
        return self.torch.nn.functional.unfold(
            x, g.kernel, dilation=g.dilation, padding=g.padding[:2], stride=g.strides
        )

    def _lowered(self) -> Way:
        def product(x: Any, w: Any) -> Any:
            return self.torch.matmul(w, self._lower(x))

        calls = [_call(product, x, w) for x, w in zip(self.x, self.weights, strict=True)]
        return Way("lowered", calls, self._as_images)

    def _as_images(self, result: Any) -> np.ndarray:
        return _host(result).reshape(self.case.shapes[1])

    def _cusparse(self) -> dict[str, list[Way]]:
        torch = self.torch
        sparse = [w.to_sparse_csr() for w in self.weights]
        if not self.is_conv:
            sets = list(zip(sparse, self.x, strict=True))
            turned = [(w, x.t().contiguous()) for w, x in sets]
            return {
                "cusparse": [
                    Way("tokens in rows", [_call(torch.mm, w, x.t()) for w, x in sets], _turned),
                    Way("tokens in columns", [_call(torch.mm, w, t) for w, t in turned], _turned),
                ]
            }

        def lowered(x: Any, w: Any) -> Any:
            columns = self._lower(x)
            return torch.mm(w, columns.transpose(0, 1).reshape(columns.shape[1], -1))

        def by_image(x: Any, w: Any) -> Any:
            return torch.stack([torch.mm(w, image) for image in self._lower(x)])

        sets = list(zip(self.x, sparse, strict=True))
        ready = [
            (w, self._lower(x).transpose(0, 1).reshape(w.shape[1], -1).contiguous())
            for x, w in sets
        ]
        return {
            "cusparse": [
                Way("lowered at once", [_call(lowered, *pair) for pair in sets], self._swapped),
                Way("image by image", [_call(by_image, *p) for p in sets], self._as_images),
            ],
            "cusparse product alone": [
                Way("lowered beforehand", [_call(torch.mm, *p) for p in ready], self._swapped)
            ],
        }

    def _swapped(self, result: Any) -> np.ndarray:
        """Read [outputs, images x pixels]."""
        images, outputs, *size = self.case.shapes[1]
        return np.swapaxes(_host(result).reshape(outputs, images, *size), 0, 1)

    def _cusparselt(self) -> dict[str, list[Way]]:
        """2:4 through cuSPARSELt, its fastest algorithm, and through PyTorch's CUTLASS kernels."""
        if self.case.form != "2:4":
            raise MissingPeerError(f"zeros are {self.case.form}, not 2:4")
        from torch.sparse import (
            SparseSemiStructuredTensorCUSPARSELT,
            SparseSemiStructuredTensorCUTLASS,
        )

        columns = self._columns()
        found: dict[str, list[Way]] = {}
        kinds = {
            "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
            "cutlass 2:4": SparseSemiStructuredTensorCUTLASS,
        }
        reasons = []
        for name, kind in kinds.items():
            try:
                sparse = [kind.from_dense(w) for w in self.weights]
                calls = [_call(self.torch.mm, w, c) for w, c in zip(sparse, columns, strict=True)]
                calls[0]()
                found[name] = [Way("first algorithm", calls, self._read_columns)]
                if name == "cusparselt":
                    found[name] += self._searched(sparse, columns)
            except (RuntimeError, AttributeError, NotImplementedError, TypeError) as error:
                reasons.append(f"{name}: {_first(error)}")
        if not found:
            raise MissingPeerError("; ".join(reasons))
        if reasons:
            print(f"{self.case.name}: left out: {'; '.join(reasons)}")
        return found

    def _columns(self) -> list[Any]:
        """Activations as [inputs, columns], each column contiguous."""
        if not self.is_conv:
            return [x.t() for x in self.x]
        lowered = [self._lower(x) for x in self.x]
        return [c.transpose(1, 2).reshape(-1, c.shape[1]).contiguous().t() for c in lowered]

    def _read_columns(self, result: Any) -> np.ndarray:
        return self._swapped(result) if self.is_conv else _turned(result)

    def _searched(self, sparse: Sequence[Any], columns: Sequence[Any]) -> list[Way]:
        """Let cuSPARSELt search its algorithms, where this PyTorch can."""
        torch = self.torch
        search = getattr(torch, "_cslt_sparse_mm_search", None)
        if search is None:
            return []
        best = search(sparse[0].packed, columns[0])
        number = int(best[0] if isinstance(best, (tuple, list)) else best)
        calls = [
            _call(torch._cslt_sparse_mm, w.packed, c, alg_id=number)
            for w, c in zip(sparse, columns, strict=True)
        ]
        return [Way(f"algorithm {number}", calls, self._read_columns)]

    def _cudnn(self) -> dict[str, list[Way]]:
        g = self.case.geometry
        if not isinstance(g, Conv2dGeometry):
            raise MissingPeerError("the layer is no convolution")
        torch = self.torch
        ways = []
        for name, order in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
            images = [x.to(memory_format=order) for x in self.x]
            shape = (g.out_channels, g.in_channels, *g.kernel)
            filters = [w.reshape(shape).to(memory_format=order) for w in self.weights]
            calls = [
                _call(
                    torch.nn.functional.conv2d,
                    x,
                    w,
                    stride=g.strides,
                    padding=g.padding[:2],
                    dilation=g.dilation,
                )
                for x, w in zip(images, filters, strict=True)
            ]
            ways.append(Way(name, calls, _host))
        return {"cudnn": ways}


class CupyPeers:
    """cuBLAS and cuSPARSE through CuPy, for matrix products."""

    def __init__(self, case: Case, weight: np.ndarray, activations: Sequence[Any]) -> None:
        self.cupy = importlib.import_module("cupy")
        self.case = case
        self.x = [self.cupy.from_dlpack(tensor) for tensor in activations]
        self.weights = [self.cupy.asarray(weight) for _ in self.x]

    def ways(self, peer: str) -> dict[str, list[Way]]:
        """Return the ways of a peer, by the name that results stand under.

        Raises
        ------
        MissingPeerError
            When it does not compute such a layer.
        """
        if peer in ("cusparselt", "cudnn") or self.case.op != "matmul":
            raise MissingPeerError("only PyTorch reaches it; install torch with CUDA")
        if peer == "cublas":
            calls = [_call(self.cupy.matmul, x, w.T) for x, w in self._sets(self.weights)]
            return {"cublas": [Way("weight as it is", calls, self.cupy.asnumpy)]}
        sparse = importlib.import_module("cupyx.scipy.sparse")
        if self.case.dtype != "float32":
            raise MissingPeerError(f"CuPy's sparse matrices are not of {self.case.dtype}")
        matrices = [sparse.csr_matrix(w) for w in self.weights]
        calls = [_call(w.dot, x.T) for x, w in self._sets(matrices)]
        return {"cusparse": [Way("tokens in rows", calls, lambda y: self.cupy.asnumpy(y).T)]}

    def _sets(self, weights: Sequence[Any]) -> list[tuple[Any, Any]]:
        return list(zip(self.x, weights, strict=True))


def find_peers() -> tuple[type | None, str]:
    """Choose where peers come from, and say in a line what is missing."""
    try:
        _torch()
        return TorchPeers, ""
    except MissingPeerError as error:
        why = str(error)
    try:
        importlib.import_module("cupy")
    except ImportError:
        return None, f"{why}, and CuPy is not installed: no peers"
    return CupyPeers, f"{why}: cuBLAS and cuSPARSE through CuPy, neither cuDNN nor cuSPARSELt"


def versions() -> Mapping[str, str]:
    """Name what peers come from."""
    try:
        torch = _torch()
    except MissingPeerError:
        return {}
    return {
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }


def _torch() -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise MissingPeerError("PyTorch is not installed") from None
    if not torch.cuda.is_available():
        raise MissingPeerError("this PyTorch does not reach the GPU")
    # float32 means float32: TF32 rounds operands to ten bits.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    return torch


def _call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[], Any]:
    def call() -> Any:
        return function(*arguments, **options)

    return call


def _host(result: Any) -> np.ndarray:
    array: np.ndarray = result.detach().cpu().contiguous().numpy()
    return array


def _turned(result: Any) -> np.ndarray:
    return _host(result).T


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
