"""`prune`: set the least important weights of a model to zero."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import numpy as np
import onnx

from ..errors import ModelError, SparseError
from ..files import read_onnx
from ..model import Model
from ..onnx_check import check_model, check_tensors
from .activations import find_energy
from .budgets import Scope, check_scope, share_of
from .cutting import Scored, cut_masks
from .model_weights import ModelWeights
from .onnx_weights import OnnxWeights
from .patterns import Pattern, parse_pattern
from .remove_channels import ChannelRemoval, remove_dead_channels
from .report import LayerCut, Pruning
from .scores import Scores, check_scores, gradient_of, magnitude, spread_energy, taylor, wanda
from .sites import PrunableLayer, Site

AnyModel = TypeVar("AnyModel", onnx.ModelProto, Model)


def prune(
    model: str | os.PathLike[str] | AnyModel,
    pattern: str = "unstructured",
    sparsity: float | None = None,
    scope: Scope | None = None,
    skip: Sequence[str] = (),
    seed: int = 0,
    *,
    scores: Scores = "magnitude",
    gradients: Mapping[str, Any] | None = None,
    calibration: Any = None,
    remove_channels: bool = False,
) -> Any:
    """Set the least important weights to zero; the model that was given is not changed.

    Parameters
    ----------
    model : path, onnx.ModelProto or Model
        What to prune; for a ``torch.nn.Module`` there is `prune_module`.
    pattern : str
        "unstructured", "N:M" (for example "2:4"), "V:N:M", "block:RxC", "vector:V", "vector:1xV",
        "kernel", "channel", "filter", "neuron", "tile-wise:G" or "tile-wise:G+R%"; the text of
        `tvm_sparse.pruning` says what each one means.
    sparsity : float, optional
        Share of zeros to reach, from 0 to below 1; 0.9 when it is not given. N:M and V:N:M fix it:
        leave it out there.
    scope : {"global", "layer", "erk", "row"}, optional
        Rank units over all layers together (the default), each layer on its own, each on its own
        with Erdos-Renyi-Kernel densities, or each output row on its own (the default with Wanda's
        scores, "layer" where a pattern cuts across rows). N:M and V:N:M are the same in all.
    skip : sequence of str
        Names or patterns (``fnmatch``) of layers to leave alone.
    seed : int
        Decides between units of equal rank.
    scores : {"magnitude", "taylor", "wanda"}
        ``|w|``; ``|w * gradient|``; or ``|w|`` times the norm of the input that w multiplies.
    gradients : mapping of str to array, optional
        For "taylor": the gradient of each layer's weight, of the weight's shape, by the layer's
        or the weight's name.
    calibration : mapping of str to array, or a sequence of mappings, optional
        For "wanda": inputs to run the dense model on.
    remove_channels : bool
        Afterwards, remove output channels that are zero from an ONNX model; see
        `remove_dead_channels`.

    Returns
    -------
    onnx.ModelProto or Model
        A pruned copy, of the kind that went in (a path gives a ModelProto).

    Raises
    ------
    SparseError
        When the pattern, the sparsity, the scope or the scores make no sense.
    ModelError
        When the model cannot be read, or holds no weight that can be pruned.
    """
    return prune_with_report(
        model,
        pattern,
        sparsity,
        scope,
        skip,
        seed,
        scores=scores,
        gradients=gradients,
        calibration=calibration,
        remove_channels=remove_channels,
    ).model


def prune_with_report(
    model: str | os.PathLike[str] | AnyModel,
    pattern: str = "unstructured",
    sparsity: float | None = None,
    scope: Scope | None = None,
    skip: Sequence[str] = (),
    seed: int = 0,
    *,
    scores: Scores = "magnitude",
    gradients: Mapping[str, Any] | None = None,
    calibration: Any = None,
    remove_channels: bool = False,
) -> Pruning:
    """Prune as `prune` does, and return the model together with what was cut and what was not."""
    parsed = parse_pattern(pattern)
    share = share_of(parsed, pattern, sparsity)
    known = check_scope(scope, parsed, pattern, scores)
    check_scores(scores, gradients, calibration)
    if remove_channels and isinstance(model, Model):
        raise SparseError("channels are removed from ONNX models; prune the file, then load it")
    weights = _open(model)
    chosen, kept, notes = choose(weights.sites, weights.refused, parsed, skip)
    energies = weights.energies(calibration) if scores == "wanda" else {}
    scored = [
        Scored(site.view, _scores(site, scores, gradients or {}, energies), site.dims)
        for site in chosen
    ]
    masks = cut_masks(scored, parsed, share, known, np.random.default_rng(seed))
    layers = tuple(_apply(site, mask) for site, mask in zip(chosen, masks, strict=True))
    result: Any = weights.close()
    removed: tuple[ChannelRemoval, ...] = ()
    if remove_channels:
        result, removed = remove_dead_channels(result)
    notes += weights.notes + emptied(layers)
    return Pruning(result, pattern, layers, kept, notes, known, scores, removed)


def prunable_layers(model: str | os.PathLike[str] | AnyModel) -> tuple[PrunableLayer, ...]:
    """List the layers that `prune` would touch, in the order of the graph."""
    return tuple(site.layer for site in _open(model).sites)


def choose(
    sites: Sequence[Site], refused: Mapping[str, str], pattern: Pattern, skip: Sequence[str]
) -> tuple[list[Site], dict[str, str], tuple[str, ...]]:
    """Separate the layers to prune from those to leave alone.

    Returns
    -------
    tuple
        The sites to prune; the reasons of all others by name; notes on `skip`.

    Raises
    ------
    ModelError
        When there is nothing that could be pruned.
    """
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    kept = dict(refused)
    chosen: list[Site] = []
    for site in sites:
        name = site.layer.name
        match = next((p for p in skip if _matches(name, p)), None)
        reason = pattern.refuse(site.layer) if match is None else f"skip names it ('{match}')"
        if reason:
            kept[name] = reason
        else:
            chosen.append(site)
    if not sites:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in kept.items())
        raise ModelError(
            "the model has no weight of a Conv, Gemm or MatMul that can be pruned"
            + (f" ({reasons})" if reasons else "")
        )
    names = [site.layer.name for site in sites]
    notes = tuple(
        f"skip '{p}' matches no layer" for p in skip if not any(_matches(n, p) for n in names)
    )
    return chosen, kept, notes


def emptied(layers: Sequence[LayerCut]) -> tuple[str, ...]:
    """Note the layers that pruning left without any weight."""
    return tuple(
        f"layer '{cut.layer.name}' has no nonzero weight left; scope='layer' spreads the cut evenly"
        for cut in layers
        if cut.size and cut.zeros_after == cut.size > cut.zeros_before
    )


def count_zeros(view: np.ndarray) -> int:
    """Count the zeros of an array."""
    return int(view.size - np.count_nonzero(view))


def _apply(site: Site, mask: np.ndarray) -> LayerCut:
    before = count_zeros(site.view)
    site.view[mask] = 0
    return LayerCut(site.layer, site.view.size, before, count_zeros(site.view))


def _scores(
    site: Site,
    scores: str,
    gradients: Mapping[str, Any],
    energies: Mapping[str, np.ndarray],
) -> np.ndarray:
    if scores == "taylor":
        return taylor(site.view, gradient_of(site, gradients))
    if scores == "wanda":
        return wanda(site.view, spread_energy(site, find_energy(site.layer.name, energies)))
    return magnitude(site.view)


def _matches(name: str, pattern: str) -> bool:
    return any(part == pattern or fnmatchcase(part, pattern) for part in (name, *name.split(", ")))


def _open(model: Any) -> OnnxWeights | ModelWeights:
    if isinstance(model, Model):
        return ModelWeights(model)
    if isinstance(model, onnx.ModelProto):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        check_model(copy, "the model")
        check_tensors(copy)
        return OnnxWeights(copy)
    if isinstance(model, (str, os.PathLike)):
        return OnnxWeights(read_onnx(model))
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__}
    if "torch.nn.modules.module.Module" in names:
        raise ModelError("a torch.nn.Module is pruned in place by prune_module")
    raise ModelError(
        "pruning takes a path, an onnx.ModelProto or a loaded model; "
        f"this is a {type(model).__name__}"
    )
