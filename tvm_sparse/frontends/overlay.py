"""Lay the weights of a checkpoint over those of a model, by name."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..dtypes import numpy_dtype
from ..errors import ModelError
from .checkpoint import Checkpoint, Entry, open_checkpoint, text_of
from .mask_names import masked_weight, plain_name
from .tensor_files import open_tensors

_NAMES_IN_A_NOTE = 4

# What wraps a whole module: data parallelism, transformers' heads, torch.compile.
_WRAPPERS = {"module.", "model.", "_orig_mod."}


@dataclass(frozen=True)
class Target:
    """A weight of a model that another may take the place of.

    Attributes
    ----------
    aliases : tuple of str
        What the parameter may have been called before an exporter renamed it.
    matrix : bool
        It is an operand of a matrix product: exporters store those transposed at times.
    columns : bool
        Its outputs are its columns; in PyTorch's layers they are the rows.
    folded : bool
        What it was called is known by aliases only, and it is no mere transpose: something was
        folded into it. Masks still fit it.
    """

    name: str
    value: np.ndarray
    aliases: tuple[str, ...] = ()
    matrix: bool = False
    columns: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Overlay:
    """What was laid over: the new values by the target's name, and sentences for the report."""

    values: Mapping[str, np.ndarray]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Match:
    target: Target
    entry: Entry
    by_alias: bool


def lay_over(targets: Sequence[Target], checkpoint: Checkpoint) -> Overlay:
    """Match a checkpoint with a model's weights, and return what these become.

    A weight takes the place of the model's, in the model's type; a mask sets to zero what it hides.

    Raises
    ------
    ModelError
        When nothing matches, a shape does not fit, a match is ambiguous, or a weight that the model
        has is quantised in the checkpoint.
    """
    matches, prefixes = _match_names(targets, checkpoint)
    if not matches:
        raise ModelError(_nothing_matches(targets, checkpoint))
    _refuse_folded(matches, checkpoint)
    turned = _turned(matches, checkpoint.title)
    values = {m.target.name: _new_value(m, m.target.name in turned) for m in matches}
    return Overlay(values, tuple(_notes(targets, checkpoint, matches, turned, prefixes)))


def lay_over_parameters(values: Mapping[str, Any], weights: Any) -> Overlay:
    """Lay a checkpoint over named parameters, of which some may be masks of others.

    Parameters
    ----------
    values : mapping of str to array
        Of NumPy or PyTorch.
    weights
        As for `open_tensors`.

    Returns
    -------
    Overlay
        With new masks, too: they hide nothing, since the new weights have their zeros in them.

    Raises
    ------
    ModelError
        As for `lay_over`.
    """
    files = open_tensors(values)
    own = open_checkpoint(files)
    targets = [
        Target(name, entry.read())
        for name, entry in own.entries.items()
        if entry.shape and not entry.is_mask
    ]
    overlay = lay_over(targets, open_checkpoint(weights))
    changed = {}
    for name, tensor in files.tensors.items():
        if plain_name(name) in overlay.values:
            changed[name] = overlay.values[plain_name(name)]
        elif masked_weight(name) in overlay.values:
            changed[name] = np.ones_like(tensor.read())
    return Overlay(changed, overlay.notes)


# ---------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------

Prefixes = tuple[str, str]


def _match_names(
    targets: Sequence[Target], checkpoint: Checkpoint
) -> tuple[list[_Match], Prefixes]:
    """Match under the pair of prefixes (of the checkpoint, of the model) that fits most names."""
    names = {name for target in targets for name in (target.name, *target.aliases)}
    keys = [*checkpoint.entries, *checkpoint.refused]
    pairs = [
        pair
        for pair in itertools.product(_prefixes(keys), _prefixes(names))
        # Two different modules may hold parameters of the same names; a wrapper is no module.
        if not all(pair) or not _WRAPPERS.isdisjoint(pair)
    ]
    counts = {}
    for ours, theirs in pairs:
        plain = {name.removeprefix(theirs) for name in names}
        counts[ours, theirs] = sum(key.removeprefix(ours) in plain for key in keys)
    # No prefix is better than one that fits no more names, and a short one better than a long one.
    best = max(pairs, key=lambda pair: (counts[pair], -len(pair[0]) - len(pair[1])))
    entries = _without(best[0], checkpoint.entries, checkpoint.title)
    refused = _without(best[0], checkpoint.refused, checkpoint.title)
    matches = []
    for target in targets:
        own = target.name.removeprefix(best[1])
        aliases = [alias.removeprefix(best[1]) for alias in target.aliases]
        for name in dict.fromkeys([own, *aliases]):
            if name in refused:
                raise ModelError(
                    f"the weight '{refused[name][0]}' of {checkpoint.title} cannot be taken: "
                    f"{refused[name][1]}"
                )
            if name in entries:
                matches.append(_Match(target, entries[name][1], name != own))
                break
    return matches, best


def _prefixes(names: Iterable[str]) -> list[str]:
    """List what at least half of the names begin with, up to a dot; and nothing at all."""
    counts: Counter[str] = Counter()
    total = 0
    for name in names:
        total += 1
        parts = name.split(".")[:-1][:3]
        counts.update(".".join(parts[: i + 1]) + "." for i in range(len(parts)))
    return ["", *(prefix for prefix, count in counts.items() if 2 * count >= total)]


def _without(prefix: str, items: Mapping[str, Any], title: str) -> dict[str, tuple[str, Any]]:
    """Return (name, item) by the name without the prefix."""
    found: dict[str, tuple[str, Any]] = {}
    for name, item in items.items():
        plain = name.removeprefix(prefix)
        if plain in found:
            raise ModelError(
                f"'{found[plain][0]}' and '{name}' of {title} may both be the model's '{plain}'"
            )
        found[plain] = (name, item)
    return found


def _refuse_folded(matches: Sequence[_Match], checkpoint: Checkpoint) -> None:
    """Refuse weights for a graph whose exporter put BatchNorms into the convolutions."""
    taken = {match.entry.name for match in matches}
    norms = [name for name in checkpoint.entries if name.endswith(".running_mean")]
    lost = bool(norms) and taken.isdisjoint(norms)
    for match in matches:
        if match.entry.is_mask or len(match.entry.shape) < 3:
            continue
        if lost or (match.by_alias and match.target.folded):
            raise ModelError(
                f"'{match.entry.source}' of {checkpoint.title} is not what the model holds as "
                f"'{match.target.name}': an exporter folded "
                + (f"the BatchNorm of '{norms[0]}' into it" if lost else "something into it")
                + "; export without folding, or lay masks over it"
            )


def _nothing_matches(targets: Sequence[Target], checkpoint: Checkpoint) -> str:
    theirs = listed([*checkpoint.entries, *checkpoint.refused])
    ours = listed([target.name for target in targets])
    return (
        f"no tensor of {checkpoint.title} has the name of a weight of the model: there are "
        f"{theirs or 'none'}, and the model has {ours or 'none'}"
    )


# ---------------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------------

Layout = Literal["straight", "turned", "either"]


def _turned(matches: Sequence[_Match], title: str) -> set[str]:
    """Name the targets that hold the transpose of what the checkpoint has.

    A square matrix does not say: it is taken to lie as the others do that the exporter named alike.
    """
    found: set[str] = set()
    seen: dict[tuple[bool, bool], dict[str, str]] = defaultdict(dict)
    squares: list[_Match] = []
    for match in matches:
        layout = _layout(match, title)
        if layout == "either":
            squares.append(match)
        elif match.target.matrix and len(match.entry.shape) == 2:
            seen[_kind(match)][layout] = match.target.name
        if layout == "turned":
            found.add(match.target.name)
    for match in squares:
        layouts = seen[_kind(match)]
        if len(layouts) == 2:
            raise ModelError(
                f"'{match.entry.source}' of {title} is square, and may or may not be transposed in "
                f"the model: of the others, '{layouts['turned']}' is and '{layouts['straight']}' "
                "is not"
            )
        # What an exporter renamed lies as its operator reads it; what kept its name lies as it did.
        renamed = match.by_alias and match.target.columns
        if "turned" in layouts or (not layouts and renamed):
            found.add(match.target.name)
    return found


def _kind(match: _Match) -> tuple[bool, bool]:
    """Tell apart what exporters treat differently."""
    return match.by_alias, match.target.columns


def _layout(match: _Match, title: str) -> Layout:
    ours, theirs = match.target.value.shape, match.entry.shape
    if match.target.matrix and len(ours) == 2 and ours[0] == ours[1] and ours == theirs:
        return "either"
    if ours == theirs:
        return "straight"
    if match.target.matrix and len(ours) == 2 and ours == theirs[::-1]:
        return "turned"
    raise ModelError(
        f"'{match.entry.source}' of {title} is {text_of(theirs)}, but the model's "
        f"'{match.target.name}' is {text_of(ours)}"
    )


def _new_value(match: _Match, turned: bool) -> np.ndarray:
    value, old = match.entry.read(), match.target.value
    value = np.ascontiguousarray(value.T if turned else value).reshape(old.shape)
    if match.entry.is_mask:
        return np.where(value, old, np.zeros((), old.dtype))
    return value.astype(old.dtype, copy=False)


# ---------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------


def _notes(
    targets: Sequence[Target],
    checkpoint: Checkpoint,
    matches: Sequence[_Match],
    turned: set[str],
    prefixes: Prefixes,
) -> Iterable[str]:
    title = checkpoint.title
    masks = sum(match.entry.is_mask for match in matches)
    weights = len(matches) - masks
    parts = [f"{weights}"] if weights else []
    parts += [f"masks for {masks}"] if masks else []
    taken = {match.target.name for match in matches}
    kept = [target.name for target in targets if target.name not in taken]
    yield f"{title} gave {' and '.join(parts)} of the model's {len(targets)} weights and biases" + (
        f"; as they were: {listed(kept)}" if kept and weights else ""
    )
    used = {match.entry.name for match in matches}
    left = [entry.source for name, entry in checkpoint.entries.items() if name not in used]
    left += checkpoint.refused
    if left:
        yield f"the model has no place for {listed(left)} of {title}"
    for prefix, owner in zip(prefixes, (title, "the model"), strict=True):
        if prefix:
            yield f"names were matched without the prefix '{prefix}' of {owner}"
    if turned:
        yield f"laid over transposed, as the exporter wrote them: {listed(sorted(turned))}"
    narrower = [m.target.name for m in matches if not m.entry.is_mask and _narrows(m)]
    if narrower:
        yield f"values of {title} were rounded to the model's type in {listed(narrower)}"


def _narrows(match: _Match) -> bool:
    return not np.can_cast(numpy_dtype(match.entry.dtype), match.target.value.dtype)


def listed(names: Sequence[str]) -> str:
    """Quote the first few names, and count the others."""
    shown = ", ".join(f"'{name}'" for name in names[:_NAMES_IN_A_NOTE])
    more = len(names) - _NAMES_IN_A_NOTE
    return f"{shown} and {more} more" if more > 0 else shown
