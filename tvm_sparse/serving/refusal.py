"""What a server answers when it does not do what it was asked: a status and a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..errors import SparseError

# Of what a client wrote, an answer repeats no more than this.
_LONGEST_QUOTE = 80


class Refusal(SparseError):
    """A request that is answered with an error.

    Parameters
    ----------
    status : int
        The HTTP status, from 400 on.
    sentence : str
        Why.
    headers : mapping of str to str
        What else the answer says.
    """

    def __init__(
        self, status: int, sentence: str, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, dict(headers)


def quoted(text: str) -> str:
    """Repeat what a client wrote, if it is not too long."""
    short = text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."
    return f"'{short}'"
