"""What pruning did: layer by layer, as a table and as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .remove_channels import ChannelRemoval
from .sites import PrunableLayer


@dataclass(frozen=True)
class LayerCut:
    """What pruning did to one layer: zeros before and after, of `size` elements."""

    layer: PrunableLayer
    size: int
    zeros_before: int
    zeros_after: int

    @property
    def sparsity(self) -> float:
        """Share of zeros afterwards; 0 for a weight without elements."""
        return self.zeros_after / self.size if self.size else 0.0


@dataclass(frozen=True)
class Pruning:
    """A pruned model, and the report of what was cut.

    Attributes
    ----------
    model : onnx.ModelProto, Model or torch.nn.Module
        Of the kind that went in (a path gives a ModelProto).
    pattern, scope, scores : str
        What was cut, over what it was ranked, and by what.
    layers : tuple of LayerCut
        Every pruned layer, in the order of the graph; shapes and zeros before channels were
        removed.
    kept : mapping of str to str
        Layers that were left alone, with the reason.
    notes : tuple of str
        What else a person should know, for example a `skip` that matches nothing.
    removed : tuple of ChannelRemoval
        Layers that became smaller, or could have: where zero channels stay, with the reason.
    """

    model: Any
    pattern: str
    layers: tuple[LayerCut, ...]
    kept: Mapping[str, str]
    notes: tuple[str, ...] = ()
    scope: str = "global"
    scores: str = "magnitude"
    removed: tuple[ChannelRemoval, ...] = field(default=())

    @property
    def sparsity(self) -> float:
        """Share of zeros over all pruned layers."""
        size = sum(cut.size for cut in self.layers)
        return sum(cut.zeros_after for cut in self.layers) / size if size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the model."""
        return {
            "pattern": self.pattern,
            "scope": self.scope,
            "scores": self.scores,
            "sparsity": self.sparsity,
            "layers": [
                {**dataclasses.asdict(cut.layer), "size": cut.size, "zeros": cut.zeros_after}
                for cut in self.layers
            ],
            "kept": dict(self.kept),
            "notes": list(self.notes),
            "removed": [dataclasses.asdict(removal) for removal in self.removed],
        }

    def __str__(self) -> str:
        width = max([len(cut.layer.name) for cut in self.layers] + [5])
        lines = [f"{'layer':<{width}}  {'op':<6}  {'shape':<18}  zeros before   after"]
        for cut in self.layers:
            before = cut.zeros_before / cut.size if cut.size else 0.0
            shape = "x".join(map(str, cut.layer.shape))
            lines.append(
                f"{cut.layer.name:<{width}}  {cut.layer.op:<6}  {shape:<18}  "
                f"{before:>11.1%}  {cut.sparsity:>6.1%}"
            )
        lines.append(
            f"{len(self.layers)} layers pruned to {self.sparsity:.1%} zeros in all "
            f"({self.pattern}, scope {self.scope}, by {self.scores})"
        )
        lines += [str(removal) for removal in self.removed]
        lines += [f"left alone: {name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
