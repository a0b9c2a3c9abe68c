"""What the zeros of a weight amount to: the forms that stand, and a word."""

from __future__ import annotations

import numpy as np

from ..findings import Finding
from .blocks import block_findings, kernel_findings
from .channels import channel_finding
from .counts import Counts
from .groups import group_finding
from .tilewise import tile_findings
from .vnm import vnm_finding
from .zeros import Zeros

# From this density on a weight is called dense: no kernel gains anything from the rest.
DENSE = 0.95


def find(weight: np.ndarray, counts: Counts) -> tuple[Finding, ...]:
    """Return the forms that a weight has, the one of the largest parts first.

    What holds exactly follows what nearly holds of larger parts: nonzeros between blocks leave
    smaller blocks as they were.

    N:M is looked for only where no parts are dropped as a whole: of every other channel, 1:2 holds
    as well, and says less.
    """
    if not counts.nnz or counts.nnz >= DENSE * counts.size:
        return ()
    zeros = Zeros(weight, counts)
    channel = channel_finding(zeros)
    if channel and channel.exact:
        return (channel,)
    found = [(counts.size, channel)] if channel else []
    found += [*block_findings(zeros), *kernel_findings(zeros), *tile_findings(zeros)]
    if found:
        first, *others = (finding for _, finding in sorted(found, key=lambda claim: -claim[0]))
        return (first, *(other for other in others if other.exact and not first.exact))
    finding = vnm_finding(zeros) or group_finding(zeros)
    return (finding,) if finding else ()


def pattern(counts: Counts, findings: tuple[Finding, ...]) -> str:
    """Name the whole in a word."""
    if not counts.size:
        return "empty"
    if not counts.nnz:
        return "zero"
    if counts.nnz >= DENSE * counts.size:
        return "dense"
    return findings[0].word if findings else "unstructured"
