"""Programs of torch.export become a Model."""

from __future__ import annotations

import copy
import logging
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import MissingExtraError, ModelError, SparseError, last_line
from ..model import Model
from ..passes.rewrite_main import main_of
from .overlay import lay_over_parameters
from .relax import as_numpy, finish, spec_of


def load_torch(
    program: Any, *, shapes: Mapping[str, Sequence[int]] | None = None, weights: Any = None
) -> Model:
    """Make a `Model` of a ``torch.export.ExportedProgram``.

    Layers are named by their module path, for example ``layers.0.linear1``. `weights` is as for
    `load`.

    Raises
    ------
    ModelError
        When TVM's importer lacks an operator of the program.
    """
    notes: tuple[str, ...] = ()
    if weights is not None:
        program, notes = _with_weights(program, weights)
    mod = _import_program(program)
    func = main_of(mod)
    targets = _parameter_targets(program)
    parameters = func.params[int(func.attrs["num_input"]) :]
    values, layers = {}, {}
    attached = dict(zip([var.name for var in parameters], func.attrs["params"], strict=False))
    for var in parameters:
        target = targets.get(var.name, var.name)
        values[var.name] = _value(program, target, attached[var.name])
        layers[var.name] = _layer_of(target)
    inputs = func.params[: int(func.attrs["num_input"])]
    model = Model(
        mod=mod,
        params=values,
        layer_names=layers,
        inputs=tuple(spec_of(var.name, var.ty) for var in inputs),
        outputs=(),
        source="a torch.export program",
        notes=notes,
    )
    outputs = [str(name) for name in program.graph_signature.user_outputs]
    return finish(model, shapes=shapes, output_names=outputs)


def open_program(path: str | os.PathLike[str]) -> Any:
    """Read a program that ``torch.export.save`` wrote; of what is pickled in it, tensors only.

    PyTorch's reader evaluates expressions of the file all the same: see docs/trust.md.

    Raises
    ------
    ModelError
        When it cannot be read, or holds pickled objects other than tensors.
    MissingExtraError
        When PyTorch is not installed.
    """
    if not os.path.exists(path):
        raise ModelError(f"there is no file '{path}'")
    try:
        import torch
    except ImportError:
        raise MissingExtraError(
            f"'{path}' needs PyTorch, which is not installed: pip install tvm-sparse[torch]"
        ) from None
    if not zipfile.is_zipfile(path):
        raise ModelError(f"'{path}' is not a file that torch.export.save wrote")
    try:
        _refuse_objects(path)
        with _tensors_only(), _without_log():
            return torch.export.load(path)
    except SparseError:
        raise
    except Exception as error:
        # Whatever zip files, JSON and PyTorch's own checks raise.
        raise ModelError(f"'{path}' cannot be read: {last_line(error)}") from error


# What files of the archive are called that are unpickled whatever they hold.
_OBJECTS = ("custom_obj_", "opaque_obj_")


def _refuse_objects(path: str | os.PathLike[str]) -> None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.rpartition("/")[2].startswith(_OBJECTS):
                raise ModelError(
                    f"'{path}' holds an object that unpickling would run code of: '{name}'"
                )


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Make PyTorch unpickle tensors and nothing else, also where it would try again without."""
    before = {name: os.environ.pop(name, None) for name in _PICKLING}
    os.environ[_PICKLING[0]] = "1"
    try:
        yield
    finally:
        del os.environ[_PICKLING[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def _without_log() -> Iterator[None]:
    """Silence PyTorch's reader, which logs a traceback of its own for what it cannot open."""
    logger = logging.getLogger("torch.export")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


# PyTorch's own switches; the two contradict each other.
_PICKLING = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")


def _with_weights(program: Any, weights: Any) -> tuple[Any, tuple[str, ...]]:
    """Return a copy of a program with a checkpoint's parameters and buffers, and sentences."""
    import torch

    state = dict(program.state_dict)
    overlay = lay_over_parameters(state, weights)
    for name, value in overlay.values.items():
        tensor = torch.from_numpy(np.array(value, order="C")).to(state[name].dtype)
        is_parameter = isinstance(state[name], torch.nn.Parameter)
        state[name] = torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
    # The importer reads buffers into the body of its module: they have to be new before that.
    program = copy.copy(program)
    program._state_dict = state
    return program, overlay.notes


def _import_program(program: Any) -> Any:
    try:
        from tvm.relax.frontend.torch import from_exported_program
    except ImportError as error:
        raise MissingExtraError(f"loading a PyTorch program needs PyTorch: {error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return from_exported_program(
                program, keep_params_as_input=True, unwrap_unit_return_tuple=True
            )
    except (
        AssertionError,
        AttributeError,
        KeyError,
        NotImplementedError,
        TypeError,
        ValueError,
    ) as error:
        raise ModelError(f"TVM cannot import this PyTorch program: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _layer_of(target: str) -> str:
    """Return the path of the module that a parameter belongs to, parametrized or not."""
    head, _, tail = f".{target}".partition(".parametrizations.")
    return (head[1:] if tail else target.rpartition(".")[0]) or target


def _parameter_targets(program: Any) -> dict[str, str]:
    signature = program.graph_signature
    return {**signature.inputs_to_parameters, **signature.inputs_to_buffers}


def _value(program: Any, target: str, attached: Any) -> np.ndarray:
    tensor = program.state_dict.get(target)
    if tensor is None:
        return as_numpy(attached)
    try:
        return tensor.detach().cpu().numpy()
    except (TypeError, RuntimeError):
        # bfloat16 and other types that NumPy lacks: TVM's own copy knows them.
        return as_numpy(attached)
