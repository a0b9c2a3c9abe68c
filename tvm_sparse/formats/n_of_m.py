"""N of every M neighbours, a few bits saying which: for kernels that read a weight once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Match, PackedWeight, check_matrix

GROUPS = (4, 8)
_WORD = 32


@dataclass(frozen=True)
class NOfM:
    """Panels of `mr` rows, one a lane; in groups of `m` columns as many slots as the fullest needs.

    That number of slots, N, is the smallest that holds the weight, so that any weight can be
    packed; only where N is below M it is worth it. A slot that its group does not need holds a zero
    of a column that no other slot names. The arrays of a packed weight, with P panels and W words a
    panel, each of `groups` groups:

    - ``codes`` int32 [P, W, mr]: for each slot of a word, from the lowest bits on, the column
      inside its group, in log2(M) bits;
    - ``values`` float32 [P, W, groups * N, mr]: the slots' values.
    """

    name: str = "n_of_m"

    def supports(self, weight: np.ndarray, config: Mapping[str, Any]) -> Match:
        """Tell whether `weight` can be packed with `config`."""
        if int(config["m"]) not in GROUPS:
            known = " or ".join(map(str, GROUPS))
            return Match(False, f"groups have {known} columns, not {config['m']}")
        return check_matrix(weight)

    def pack(self, weight: np.ndarray, config: Mapping[str, Any]) -> PackedWeight:
        """Lay out a float32 matrix [rows, columns]."""
        mr, m = int(config["mr"]), int(config["m"])
        rows, columns = weight.shape
        panels, groups = -(-rows // mr), -(-columns // m)
        padded = np.zeros((panels * mr, groups * m), np.float32)
        padded[:rows, :columns] = weight
        cells = padded.reshape(-1, groups, m)
        n = max(1, int((cells != 0).sum(axis=2).max()))
        each = groups_of_word(n, m)
        words = -(-groups // each)
        # Nonzeros first, in their order.
        code = np.argsort(cells == 0, axis=2, kind="stable")[..., :n]
        value = np.take_along_axis(cells, code, axis=2)
        value[value == 0] = 0
        return PackedWeight(
            self.name,
            (rows, columns),
            {"mr": mr, "m": m, "n": n},
            {
                "codes": _in_words(_by_word(code, words * each, mr), words, m),
                "values": np.ascontiguousarray(_by_word(value, words * each, mr)).reshape(-1),
            },
        )

    def unpack(self, packed: PackedWeight) -> np.ndarray:
        """Restore the matrix."""
        mr, m, n = (packed.config[key] for key in ("mr", "m", "n"))
        rows, columns = packed.shape
        groups, each = -(-columns // m), groups_of_word(n, m)
        words = -(-groups // each)
        bits = m.bit_length() - 1
        word = packed.arrays["codes"].view(np.uint32).reshape(-1, words, 1, mr)
        slot = np.arange(each * n, dtype=np.uint32).reshape(-1, 1)
        code = word >> (slot * np.uint32(bits)) & np.uint32(m - 1)
        value = packed.arrays["values"].reshape(code.shape)
        group = np.arange(words)[:, None, None] * each + slot // n
        column = np.broadcast_to(group * m, code.shape) + code
        row = np.arange(len(code))[:, None, None, None] * mr + np.arange(mr)
        weight = np.zeros((len(code) * mr, words * each * m), np.float32)
        filled = value != 0
        weight[np.broadcast_to(row, code.shape)[filled], column[filled]] = value[filled]
        return np.ascontiguousarray(weight[:rows, :columns])


def groups_of_word(n: int, m: int) -> int:
    """Tell how many groups' codes a word of 32 bits holds."""
    return _WORD // (m.bit_length() - 1) // n


def _by_word(slots: np.ndarray, groups: int, mr: int) -> np.ndarray:
    """Turn [rows, groups, n], the groups padded, into [panels, groups * n, mr]."""
    rows, held, n = slots.shape
    padded = np.zeros((rows, groups, n), slots.dtype)
    padded[:, :held] = slots
    return padded.reshape(-1, mr, groups * n).transpose(0, 2, 1)


def _in_words(codes: np.ndarray, words: int, m: int) -> np.ndarray:
    """Put the codes [panels, slots, mr] of each word's slots together."""
    panels, slots, mr = codes.shape
    each = slots // words
    shifts = np.arange(each, dtype=np.uint32) * np.uint32(m.bit_length() - 1)
    parts = codes.astype(np.uint32).reshape(panels, words, each, mr) << shifts[:, None]
    return np.bitwise_or.reduce(parts, axis=2).view(np.int32).reshape(-1)
