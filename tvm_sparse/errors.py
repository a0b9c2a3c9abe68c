"""The one family of errors that this package raises: each message is one sentence for a person."""

from __future__ import annotations


def last_line(error: BaseException) -> str:
    """Return what a long message ends in, as TVM writes them, or else the error's kind."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1]


# A terminal shows as much in a few lines.
_LONGEST = 480


def one_sentence(text: str) -> str:
    """Return a message as one printable line of bounded length.

    Messages quote names and reasons out of files, and those may hold anything: line breaks,
    commands to a terminal, halves of characters, megabytes.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Of many lines, as TVM writes them, the first says what failed and the last why.
    whole = " ".join(lines if len(lines) <= 3 else [lines[0], "...", lines[-1]])
    if len(whole) > _LONGEST:
        whole = f"{whole[: _LONGEST - 160]} ... {whole[-120:]}"
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in whole)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 4]} ..."


class SparseError(Exception):
    """Base of every error raised on purpose; its message is one sentence for a person."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_sentence(message))


class ModelError(SparseError):
    """A model cannot be read or holds something that cannot be compiled."""


class InputError(SparseError):
    """An input array has the wrong name, type or shape."""


class PlanError(SparseError):
    """A plan cannot be read, or was made for another model."""


class RecordError(SparseError):
    """Tuning records cannot be read or written."""


class TuningError(SparseError):
    """Tuning cannot go on: nothing can be measured."""


class TargetError(SparseError):
    """A target name is unknown, or this machine lacks instructions that a library was built for."""


class CheckError(SparseError):
    """A compiled layer or model disagrees with the dense reference by more than the bound."""


class LibraryError(SparseError):
    """A file is not a library that this package exported."""


class MissingExtraError(SparseError):
    """An optional package is needed for this and is not installed."""
