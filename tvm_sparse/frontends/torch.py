"""Programs of torch.export become a Model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import MissingExtraError, ModelError
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
