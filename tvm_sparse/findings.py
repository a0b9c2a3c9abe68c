"""What was recognised in the zeros of a weight, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One form in which zeros lie.

    Attributes
    ----------
    form : str
        "channel"; "kernel"; "block:RxC"; "tile-wise:G", and "tew:G" where single elements stand
        beside the tiles; "V:N:M"; or "N:M".
    violations : int
        Nonzeros where the form has none. 0 when it holds exactly, few when it nearly does; of
        "tew:G", the elements that were restored.
    explained : float
        Share of all zeros that lie where the form wants them.
    fill : float
        Density of what the form keeps; of N:M, nonzeros over those that it allows.
    log10_chance : float
        Bound of the probability that a random matrix shows this, see `profile.profile_weight`.
    offset : tuple of int
        Row and column from which the grid of blocks is counted; (0, 0) when it is aligned.
    along : str or None
        Of N:M, what its groups are made of: "columns" or "channels".
    """

    form: str
    violations: int
    explained: float
    fill: float
    log10_chance: float
    offset: tuple[int, int] = (0, 0)
    along: str | None = None

    @property
    def exact(self) -> bool:
        """No nonzero stands where the form has none."""
        return self.violations == 0

    @property
    def word(self) -> str:
        """Name it in short, for example ``2:4``, ``nearly 2:4`` or ``block:16x16@7,0``."""
        place = "" if self.offset == (0, 0) else f"@{self.offset[0]},{self.offset[1]}"
        # Elements beside the tiles are what the name says already.
        nearly = "" if self.exact or self.form.startswith("tew:") else "nearly "
        return f"{nearly}{self.form}{place}"

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Finding:
        """Read what `dataclasses.asdict` wrote; fields of a later version are passed over.

        Raises
        ------
        KeyError, TypeError, ValueError
            When something is missing, or of another kind.
        """
        row, column = data["offset"]
        return cls(
            form=str(data["form"]),
            violations=int(data["violations"]),
            explained=float(data["explained"]),
            fill=float(data["fill"]),
            log10_chance=float(data["log10_chance"]),
            offset=(int(row), int(column)),
            along=data.get("along"),
        )
