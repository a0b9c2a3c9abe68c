"""Pruning: set the least important weights of matmuls and convolutions to zero.

`prune` works on ONNX files and loaded models and does not retrain; `prune_module` puts masks on a
``torch.nn.Module``, and fine-tuning keeps them. Biases, normalisations and embedding tables are
never touched.

How much is cut is exact. A weight is divided into units (elements, blocks, vectors, kernels or
channels, after the pattern), and of `n` units ``round(sparsity * n)`` go: those of the lowest rank,
where units that are zero already count among the cut ones. Elements rank by their score, larger
units by its mean square. Where several units share the rank at the border, which of them go is
drawn at random from `seed`. NaN and Inf count as the largest scores.

Patterns
--------
unstructured
    Units are single elements.
N:M
    In every group of M input channels of a row (and tap) the N highest scores stay; a last group of
    fewer than M keeps up to N as well. The pattern itself says how much goes.
V:N:M
    In every block of V output channels by M input channels (of a tap) 4 channels stay, those of the
    highest sum of squares, and N of these 4 in each row (Castro et al., SC 2023).
block:RxC
    Units are blocks of R output channels by C columns; the columns of a convolution are (input
    channel, tap), taps innermost. Blocks at the edges are smaller.
vector:V, vector:1xV
    Blocks of V output channels by one column, and of one output channel by V columns.
kernel
    Units are the kernels of a convolution: all taps of an output and an input channel.
channel, filter, neuron
    Units are whole output channels: of every layer, of convolutions only, of matmuls only. They
    become zeros, and the shapes stay, unless `remove_channels` is set.
tile-wise:G, tile-wise:G+R%
    Whole output channels go, the others are grouped in tiles of G in their order, and input columns
    go tile by tile (Guo et al., SC 2020); with R, the R percent of what was cut that matter most
    come back, and the sparsity that was asked for is what is left. Units differ in size here: the
    share is met to within the largest one.

Scopes
------
global, layer
    `n` counts the units of all layers together, or of one layer.
erk
    Each layer on its own, with the densities of Erdos-Renyi-Kernel (Evci et al., ICML 2020).
row
    Each output row on its own, as Wanda does (each row of blocks, for blocks).

Scores
------
magnitude
    |w|.
taylor
    |w * g|, with the gradient of the loss.
wanda
    |w| * ||x||, with the norm of the input that w multiplies over calibration inputs (Sun et al.,
    ICLR 2024); the default scope is then "row".
"""

from __future__ import annotations

from .api import prunable_layers, prune, prune_with_report
from .budgets import DEFAULT_SPARSITY, SCOPES, Scope, erk_densities
from .patterns import PATTERNS, Pattern, parse_pattern
from .remove_channels import ChannelRemoval, remove_dead_channels
from .report import LayerCut, Pruning
from .schedule import CubicSchedule, OneShot, Schedule
from .scores import SCORES, Scores
from .sites import PrunableLayer
from .torch_modules import ModulePruning, prune_module

__all__ = [
    "DEFAULT_SPARSITY",
    "PATTERNS",
    "SCOPES",
    "SCORES",
    "ChannelRemoval",
    "CubicSchedule",
    "LayerCut",
    "ModulePruning",
    "OneShot",
    "Pattern",
    "PrunableLayer",
    "Pruning",
    "Schedule",
    "Scope",
    "Scores",
    "erk_densities",
    "parse_pattern",
    "prunable_layers",
    "prune",
    "prune_module",
    "prune_with_report",
    "remove_dead_channels",
]
