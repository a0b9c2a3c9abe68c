"""Masks on a ``torch.nn.Module``, by parametrizations: fine-tuning keeps what pruning cut.

A pruned tensor becomes ``torch.where(mask, original, 0)``: zeros are plain zeros, the gradients of
pruned elements are zero, and an optimizer goes on with the original. Nothing here imports PyTorch
before it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import MissingExtraError, ModelError, SparseError
from .activations import Window, energy_of, find_energy
from .api import choose, count_zeros, emptied
from .budgets import Scope, check_scope, share_of
from .cutting import Scored, cut_masks
from .patterns import Pattern, parse_pattern
from .report import LayerCut, Pruning
from .schedule import Schedule
from .scores import SCORES, Scores, magnitude, spread_energy, taylor, wanda
from .sites import PrunableLayer, Site


@dataclass(frozen=True)
class _Owner:
    """A tensor of a module, by the module's path."""

    path: str
    module: Any
    tensor: str


@dataclass
class ModulePruning:
    """The masks of a module, as `prune_module` left them.

    Attributes
    ----------
    module : torch.nn.Module
        The module that was given; it is changed in place.
    report : Pruning
        What is cut now, layer by layer.
    """

    module: Any
    report: Pruning
    _pattern: Pattern
    _share: float
    _scope: Scope
    _seed: int
    _schedule: Schedule | None
    _calibration: Any
    _owners: dict[str, tuple[_Owner, ...]] = field(default_factory=dict)
    _masks: dict[str, Any] = field(default_factory=dict)

    def update(self, step: int | None = None) -> Pruning:
        """Choose anew what is cut, from the weights (and gradients, or activations) as they are.

        What was cut stays cut, except that features which change their tile ("tile-wise") get
        their weights back.

        Parameters
        ----------
        step : int, optional
            Which step of the schedule this is; without a schedule, leave it out.

        Returns
        -------
        Pruning
            The new report.

        Raises
        ------
        SparseError
            When a schedule lacks its step, a step its schedule, or a layer its gradient.
        """
        if (step is None) != (self._schedule is None):
            raise SparseError("a step and a schedule go together")
        if self._schedule is not None and step is not None and self._pattern.implied is None:
            self._share = self._schedule.at(step)
        if not self._masks and self._owners:
            raise SparseError("the masks of this module are permanent already")
        self._cut()
        return self.report

    def make_permanent(self) -> Any:
        """Write the zeros into the weights, take the masks off, and return the module.

        Other parametrizations of a pruned tensor become permanent along with its mask.
        """
        parametrize = _torch().nn.utils.parametrize
        for owner in (owner for owners in self._owners.values() for owner in owners):
            if parametrize.is_parametrized(owner.module, owner.tensor):
                parametrize.remove_parametrizations(owner.module, owner.tensor)
        self._masks.clear()
        return self.module

    def _cut(self) -> None:
        sites = [_site(owners, self._masks.get(name)) for name, owners in self._owners.items()]
        scored = self._score(sites)
        rng = np.random.default_rng(self._seed)
        cuts = cut_masks(scored, self._pattern, self._share, self._scope, rng)
        layers = []
        for site, cut in zip(sites, cuts, strict=True):
            owners = self._owners[site.layer.name]
            mask = self._masks[site.layer.name]
            mask.mask.copy_(
                _torch().from_numpy(~np.ascontiguousarray(cut).reshape(site.layer.shape))
            )
            before = count_zeros(_values(_original(owners[0])))
            after = count_zeros(_values(getattr(owners[0].module, owners[0].tensor)))
            layers.append(LayerCut(site.layer, site.view.size, before, after))
        notes = tuple(note for note in self.report.notes if not note.startswith("layer '"))
        self.report = replace(self.report, layers=tuple(layers), notes=(*notes, *emptied(layers)))

    def _score(self, sites: Sequence[Site]) -> list[Scored]:
        scores = self.report.scores
        energies: dict[str, np.ndarray] = {}
        if scores == "wanda":
            energies = _energies(self.module, self._owners, self._calibration)
        scored = []
        for site in sites:
            owners = self._owners[site.layer.name]
            if scores == "taylor":
                ranks = taylor(site.view, site.arrange(_gradient(owners[0])))
            elif scores == "wanda":
                energy = spread_energy(site, find_energy(site.layer.name, energies))
                ranks = wanda(site.view, energy)
            else:
                ranks = magnitude(site.view)
            scored.append(Scored(site.view, ranks, site.dims))
        return scored


def prune_module(
    module: Any,
    pattern: str = "unstructured",
    sparsity: float | None = None,
    scope: Scope | None = None,
    skip: Sequence[str] = (),
    seed: int = 0,
    *,
    scores: Scores = "magnitude",
    calibration: Any = None,
    schedule: Schedule | None = None,
) -> ModulePruning:
    """Put masks on the weights of linear and convolutional layers, in place.

    Parameters
    ----------
    module : torch.nn.Module
        Layers are named by their paths, as in its ``named_modules``.
    pattern, sparsity, scope, skip, seed
        As for `prune`.
    scores : {"magnitude", "taylor", "wanda"}
        As for `prune`; "taylor" takes the gradients from ``.grad``.
    calibration : sequence, optional
        For "wanda": a sequence of inputs to call the module with; a tuple is a call's arguments.
    schedule : CubicSchedule or OneShot, optional
        How the sparsity grows, in place of `sparsity`: this call is its step 0, and
        `ModulePruning.update` takes the later ones.

    Returns
    -------
    ModulePruning
        `.update(step)`, `.make_permanent()`, and the `.report` of what is cut.

    Raises
    ------
    SparseError
        When the pattern, the sparsity, the scope or the scores make no sense, or a gradient or
        calibration input is missing.
    ModelError
        When the module holds no weight that can be pruned.
    MissingExtraError
        When PyTorch is not installed.
    """
    torch = _torch()
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"prune_module takes a torch.nn.Module; this is a {type(module).__name__}")
    parsed = parse_pattern(pattern)
    if schedule is not None and sparsity is not None:
        raise SparseError("the schedule says the sparsity; leave sparsity out")
    wanted = sparsity if schedule is None or parsed.implied is not None else schedule.at(0)
    share = share_of(parsed, pattern, wanted)
    known = check_scope(scope, parsed, pattern, scores)
    if scores not in SCORES:
        raise SparseError(f"unknown scores '{scores}'; there are {', '.join(SCORES)}")
    if (calibration is not None) != (scores == "wanda"):
        raise SparseError("scores 'wanda' and calibration inputs go together")
    found, refused = _find(module)
    sites = [_site(owners) for owners in found]
    chosen, kept, notes = choose(sites, refused, parsed, skip)
    names = {site.layer.name for site in chosen}
    report = Pruning(module, pattern, (), kept, notes, known, scores)
    owners = {_name(group): group for group in found if _name(group) in names}
    pruning = ModulePruning(
        module, report, parsed, share, known, seed, schedule, calibration, owners
    )
    # Before anything is changed: missing gradients and inputs that do not fit.
    pruning._score(chosen)
    for name, group in owners.items():
        pruning._masks[name] = _register(group)
    pruning._cut()
    return pruning


def _torch() -> Any:
    try:
        import torch
        import torch.nn.utils.parametrize
    except ImportError as error:
        raise MissingExtraError(f"pruning a module needs PyTorch: {error}") from None
    return torch


# ---------------------------------------------------------------------------------------------
# Layers and their tensors
# ---------------------------------------------------------------------------------------------


def _find(module: Any) -> tuple[list[tuple[_Owner, ...]], dict[str, str]]:
    """Group the owners of every prunable tensor, and list what cannot be pruned."""
    nn = _torch().nn
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    groups: dict[int, list[_Owner]] = {}
    refused: dict[str, str] = {}
    for path, part in module.named_modules():
        if isinstance(part, transposed):
            refused[path] = "it is a transposed convolution"
        tensor = "weight" if isinstance(part, plain) else "in_proj_weight"
        if not isinstance(part, (*plain, nn.MultiheadAttention)):
            continue
        owner = _Owner(path or type(part).__name__, part, tensor)
        if hasattr(part, f"{tensor}_orig"):
            refused[owner.path] = (
                "torch.nn.utils.prune has a mask on it; call its prune.remove first"
            )
        elif (value := _parameter(owner)) is not None:
            if isinstance(value, nn.parameter.UninitializedParameter):
                refused[owner.path] = "its weight has no shape yet; call the module once"
            else:
                groups.setdefault(id(value), []).append(owner)
    strangers = _strangers(module, groups)
    for key, path in strangers.items():
        name = _name(tuple(groups.pop(key)))
        refused[name] = f"its weight also serves '{path}'"
    return [tuple(group) for group in groups.values()], refused


def _parameter(owner: _Owner) -> Any:
    """Return the parameter behind a tensor; None where there is none."""
    parametrize = _torch().nn.utils.parametrize
    if not parametrize.is_parametrized(owner.module, owner.tensor):
        return getattr(owner.module, owner.tensor)
    originals = owner.module.parametrizations[owner.tensor]
    return getattr(originals, "original", originals)


def _strangers(module: Any, groups: dict[int, list[_Owner]]) -> dict[int, str]:
    """Find other modules, embeddings as a rule, that share a prunable tensor."""
    mine = {(owner.path, owner.tensor) for group in groups.values() for owner in group}
    found = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for name, value in part.named_parameters(recurse=False, remove_duplicate=False):
            place = (path or type(part).__name__, name)
            same = any(owner.module is part for owner in groups.get(id(value), ()))
            if id(value) in groups and place not in mine and not same:
                found[id(value)] = path
    return found


def _name(owners: Sequence[_Owner]) -> str:
    return ", ".join(owner.path for owner in owners)


def _values(tensor: Any) -> np.ndarray:
    torch = _torch()
    tensor = tensor.detach().cpu()
    # NumPy lacks bfloat16; float32 ranks its values alike.
    kept = (torch.float16, torch.float32, torch.float64)
    return tensor.numpy() if tensor.dtype in kept else tensor.float().numpy()


def _site(owners: Sequence[_Owner], mask: Any = None) -> Site:
    """Describe a weight as it is now, what its mask hides set to zero."""
    first = owners[0]
    values = np.array(_values(_original(first)))
    if mask is not None:
        values[~mask.mask.cpu().numpy()] = 0
    groups = int(getattr(first.module, "groups", 1))
    op = "MatMul" if values.ndim == 2 else "Conv"
    layer = PrunableLayer(_name(owners), op, values.shape, groups)
    return Site(layer, first.tensor, _rows(values), _rows)


def _rows(stored: np.ndarray) -> np.ndarray:
    return stored.reshape(*stored.shape[:2], -1)


def _original(owner: _Owner) -> Any:
    """Return a tensor as it is before our mask, and after other parametrizations."""
    torch = _torch()
    parametrize = torch.nn.utils.parametrize
    if not parametrize.is_parametrized(owner.module, owner.tensor):
        return getattr(owner.module, owner.tensor)
    chain = owner.module.parametrizations[owner.tensor]
    if len(chain) == 1 and _is_mask(chain[0]):
        return chain.original
    with torch.no_grad(), _without_masks(chain):
        return chain()


@contextmanager
def _without_masks(chain: Any) -> Iterator[None]:
    masks = [(part, part.mask.clone()) for part in chain if _is_mask(part)]
    for part, _ in masks:
        part.mask.fill_(True)
    try:
        yield
    finally:
        for part, saved in masks:
            part.mask.copy_(saved)


def _is_mask(part: Any) -> bool:
    return type(part).__name__ == "Mask" and type(part).__module__ == __name__


def _gradient(owner: _Owner) -> np.ndarray:
    gradient = getattr(_parameter(owner), "grad", None)
    if gradient is None:
        raise SparseError(
            f"layer '{owner.path}' has no gradient; run a backward pass first, or skip it"
        )
    return _values(gradient)


def _register(owners: Sequence[_Owner]) -> Any:
    """Put one mask on a tensor, at all of its owners."""
    torch = _torch()
    mask = _mask_class()(torch.ones_like(_original(owners[0]), dtype=torch.bool))
    for owner in owners:
        torch.nn.utils.parametrize.register_parametrization(owner.module, owner.tensor, mask)
    return mask


_classes: dict[str, type] = {}


def _mask_class() -> Callable[[Any], Any]:
    """Make the parametrization's class once: its base is PyTorch's, which is not loaded before."""
    if "Mask" not in _classes:
        torch = _torch()

        class Mask(torch.nn.Module):  # type: ignore[name-defined]
            """What it hides is zero."""

            def __init__(self, mask: Any) -> None:
                super().__init__()
                self.register_buffer("mask", mask)

            def forward(self, tensor: Any) -> Any:
                # No product: -1 * 0 is -0.0, and NaN * 0 is NaN.
                return torch.where(self.mask, tensor, torch.zeros_like(tensor))

            def right_inverse(self, tensor: Any) -> Any:
                return tensor

        Mask.__qualname__ = "Mask"
        _classes["Mask"] = Mask
    return _classes["Mask"]


# ---------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------


def _energies(
    module: Any, owners: dict[str, tuple[_Owner, ...]], calibration: Any
) -> dict[str, np.ndarray]:
    """Call the module, in evaluation mode, and sum up the squares of its layers' inputs."""
    torch = _torch()
    energies: dict[str, np.ndarray] = {}
    hooks = [
        owner.module.register_forward_pre_hook(_watch(name, owner, energies), with_kwargs=True)
        for name, group in owners.items()
        for owner in group
    ]
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        # With gradients: without them attention layers take a path that calls no hooks.
        with torch.enable_grad():
            for call in _calls(calibration):
                module(*call)
    except (RuntimeError, TypeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise SparseError(f"the calibration inputs do not fit the module: {lines[0]}") from None
    finally:
        for hook in hooks:
            hook.remove()
        for part, training in modes:
            part.training = training
    return energies


def _calls(calibration: Any) -> list[tuple[Any, ...]]:
    calls = [calibration] if isinstance(calibration, _torch().Tensor) else list(calibration)
    if not calls:
        raise SparseError("there are no calibration inputs")
    return [call if isinstance(call, tuple) else (call,) for call in calls]


def _watch(name: str, owner: _Owner, energies: dict[str, np.ndarray]) -> Callable[..., None]:
    def hook(part: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = arguments[0] if arguments else next(iter(named.values()))
        energy = energy_of(_values(x), _window(part))
        energies[name] = energies[name] + energy if name in energies else energy

    return hook


def _window(part: Any) -> Window | None:
    if not hasattr(part, "kernel_size"):
        return None
    kernel = tuple(part.kernel_size)
    if isinstance(part.padding, str):
        # PyTorch pads "same" with strides of 1 only, the smaller half first, as ONNX's upper.
        auto = "SAME_UPPER" if part.padding == "same" else "NOTSET"
        sides = [(0, 0)] * len(kernel)
    else:
        auto, sides = "NOTSET", [(int(size), int(size)) for size in part.padding]
    return Window(kernel, tuple(part.stride), tuple(part.dilation), tuple(sides), auto)
