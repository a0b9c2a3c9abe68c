"""How large the inputs of each layer are, from calibration inputs run through the dense model."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError, SparseError
from ..model import Model

Feed = Mapping[str, Any]


@dataclass(frozen=True)
class Window:
    """How a convolution reads its input; a begin and an end of padding for every axis.

    With ONNX's ``auto_pad`` "SAME_UPPER" or "SAME_LOWER" the padding follows from the input.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    auto_pad: str = "NOTSET"

    def pads_of(self, sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Return the padding around an input of these spatial sizes."""
        if not self.auto_pad.startswith("SAME"):
            return self.pads
        found = []
        for size, kernel, stride, dilation in zip(
            sizes, self.kernel, self.strides, self.dilations, strict=True
        ):
            outputs = -(-size // stride)
            needed = max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            less, more = needed // 2, needed - needed // 2
            found.append((less, more) if self.auto_pad == "SAME_UPPER" else (more, less))
        return tuple(found)


@dataclass(frozen=True)
class Tap:
    """One use of a weight.

    Attributes
    ----------
    layer : str
        The name of its layer.
    tensor : str
        What it multiplies.
    window : Window or None
        Of a convolution; None for a product.
    axis : int
        The axis of a product's input features.
    """

    layer: str
    tensor: str
    window: Window | None = None
    axis: int = -1


def energy_of(x: np.ndarray, window: Window | None, axis: int = -1) -> np.ndarray:
    """Sum the squares of what every weight column multiplies: [channels, taps]."""
    squares = np.square(x, dtype=np.float64)
    if window is None:
        moved = np.moveaxis(squares, axis, -1)
        return moved.reshape(-1, moved.shape[-1]).sum(axis=0)[:, None]
    squares = np.pad(squares.sum(axis=0), ((0, 0), *window.pads_of(x.shape[2:])))
    spans = [
        (size - (k - 1) * dilation - 1) // stride * stride + 1
        for size, k, stride, dilation in zip(
            squares.shape[1:], window.kernel, window.strides, window.dilations, strict=True
        )
    ]
    columns = []
    for offsets in itertools.product(*map(range, window.kernel)):
        places = tuple(
            slice(offset * dilation, offset * dilation + max(span, 0), stride)
            for offset, dilation, span, stride in zip(
                offsets, window.dilations, spans, window.strides, strict=True
            )
        )
        columns.append(squares[(slice(None), *places)].reshape(squares.shape[0], -1).sum(axis=1))
    return np.stack(columns, axis=1)


def feeds_of(calibration: Any, names: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """Read calibration inputs: one call's, or a sequence of calls'.

    Parameters
    ----------
    calibration : array, mapping of str to array, or iterable of these
        A bare array is the model's only input.
    names : sequence of str
        The model's inputs.

    Raises
    ------
    InputError
        When there is none, or an input is missing.
    """
    single = isinstance(calibration, (Mapping, np.ndarray))
    calls: Iterable[Any] = [calibration] if single else calibration
    feeds = []
    for call in calls:
        feed = call if isinstance(call, Mapping) else dict(zip(names[:1], [call], strict=True))
        missing = [name for name in names if name not in feed]
        if missing:
            raise InputError(f"the calibration inputs lack '{missing[0]}'")
        feeds.append({name: np.asarray(feed[name]) for name in names})
    if not feeds:
        raise InputError("there are no calibration inputs")
    return feeds


def has_onnxruntime() -> bool:
    """Say whether ONNX Runtime can be imported."""
    return importlib.util.find_spec("onnxruntime") is not None


def onnx_energies(model: Any, taps: Sequence[Tap], calibration: Any) -> dict[str, np.ndarray]:
    """Run an ONNX model and sum up the squares of its layers' inputs.

    Runs in ONNX Runtime where that is installed, in this package's dense reference otherwise.

    Returns
    -------
    dict of str to numpy.ndarray
        By layer: [channels, taps].
    """
    if not has_onnxruntime():
        from ..frontends.loading import load

        return model_energies(load(model), calibration)
    weights = {tensor.name for tensor in model.graph.initializer}
    feeds = feeds_of(calibration, [v.name for v in model.graph.input if v.name not in weights])
    wanted = list(dict.fromkeys(tap.tensor for tap in taps if tap.tensor not in feeds[0]))
    session = _session(model, wanted)
    energies: dict[str, np.ndarray] = {}
    for feed in feeds:
        # All outputs where nothing inside is wanted: the inputs are checked all the same.
        results = _run(session, wanted, feed)
        tensors = {**feed, **dict(zip(wanted, results, strict=False))}
        for tap in taps:
            _add(energies, tap.layer, energy_of(tensors[tap.tensor], tap.window, tap.axis))
    return energies


def model_energies(model: Model, calibration: Any) -> dict[str, np.ndarray]:
    """Run a loaded model in the dense reference and sum up the squares of its layers' inputs."""
    from ..reference import Reference

    reference = Reference(model)
    energies: dict[str, np.ndarray] = {}
    for feed in feeds_of(calibration, [spec.name for spec in model.inputs]):
        run = reference.run([np.ascontiguousarray(value) for value in feed.values()])
        for capture in run.captures.values():
            window = None
            if capture.conv is not None:
                top, left, bottom, right = capture.conv.padding
                window = Window(
                    capture.weight.shape[2:],
                    capture.conv.strides,
                    capture.conv.dilation,
                    ((top, bottom), (left, right)),
                )
            layer = model.layer_names.get(capture.param, capture.param)
            _add(energies, layer, energy_of(capture.x, window))
    return energies


def find_energy(name: str, energies: Mapping[str, np.ndarray]) -> np.ndarray:
    """Look up a layer, all of its names together.

    Raises
    ------
    SparseError
        When the run did not show what goes into it.
    """
    found = [
        energies[part] for part in dict.fromkeys((name, *name.split(", "))) if part in energies
    ]
    if not found:
        raise SparseError(
            f"the inputs of layer '{name}' could not be observed; skip it or use other scores"
        )
    return np.sum(found, axis=0)


def _session(model: Any, wanted: Sequence[str]) -> Any:
    import onnx
    import onnxruntime

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    # What is an output already is not listed twice.
    have = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=n) for n in wanted if n not in have)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            copy.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise SparseError(f"ONNX Runtime cannot run this model: {_line(error)}") from None


def _run(session: Any, wanted: Sequence[str], feed: Feed) -> list[np.ndarray]:
    try:
        return session.run(list(wanted) or None, dict(feed))
    except Exception as error:
        raise InputError(f"the calibration inputs do not fit the model: {_line(error)}") from None


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def _add(energies: dict[str, np.ndarray], layer: str, energy: np.ndarray) -> None:
    energies[layer] = energies[layer] + energy if layer in energies else energy
