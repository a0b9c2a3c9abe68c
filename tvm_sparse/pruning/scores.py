"""How much an element of a weight matters: the scores that pruning ranks by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ..errors import SparseError
from .sites import Site

Scores = Literal["magnitude", "taylor", "wanda"]
SCORES: tuple[Scores, ...] = ("magnitude", "taylor", "wanda")


def check_scores(scores: str, gradients: Any, calibration: Any) -> Scores:
    """Return the scores' name when all that they need is there, and nothing else.

    Raises
    ------
    SparseError
        Otherwise.
    """
    if scores not in SCORES:
        raise SparseError(f"unknown scores '{scores}'; there are {', '.join(SCORES)}")
    if (gradients is not None) != (scores == "taylor"):
        raise SparseError("scores 'taylor' and gradients go together")
    if (calibration is not None) != (scores == "wanda"):
        raise SparseError("scores 'wanda' and calibration inputs go together")
    return next(known for known in SCORES if known == scores)


def magnitude(view: np.ndarray) -> np.ndarray:
    """Return |w|; NaN and Inf are the largest."""
    values = np.abs(view if view.dtype in (np.float32, np.float64) else view.astype(np.float32))
    values[np.isnan(values)] = np.inf
    return values


def taylor(view: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Return |w * g|: to first order, what the loss changes by when an element becomes zero.

    P. Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return magnitude(view.astype(np.float64) * gradient.astype(np.float64))


def wanda(view: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Return |w| * ||x||, with the Euclidean norm of the input that an element multiplies.

    M. Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024
    (arXiv 2306.11695).

    Parameters
    ----------
    energy : numpy.ndarray
        Sums of squares of the inputs: [1, channels, taps], or [rows, channels, taps] where groups
        of rows see different inputs.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return magnitude(magnitude(view).astype(np.float64) * np.sqrt(energy))


def gradient_of(site: Site, gradients: Mapping[str, Any]) -> np.ndarray:
    """Find a layer's gradient and arrange it as the weight's view is.

    Raises
    ------
    SparseError
        When there is none, or it is of another shape.
    """
    names = (site.layer.name, *site.layer.name.split(", "), site.root)
    name = next((name for name in names if name in gradients), None)
    if name is None:
        raise SparseError(f"there is no gradient for layer '{site.layer.name}'; skip it or give it")
    gradient = np.asarray(gradients[name])
    if gradient.shape != site.layer.shape:
        raise SparseError(
            f"the gradient of '{name}' has shape {gradient.shape}, and the weight "
            f"{site.layer.shape}"
        )
    return site.arrange(gradient)


def spread_energy(site: Site, energy: np.ndarray) -> np.ndarray:
    """Give each output row the inputs of its group.

    Parameters
    ----------
    energy : numpy.ndarray
        [input channels of all groups, taps].
    """
    rows, channels, taps = site.view.shape
    if site.layer.groups == 1:
        return energy[None]
    by_group = energy.reshape(site.layer.groups, channels, taps)
    return np.repeat(by_group, rows // site.layer.groups, axis=0)
