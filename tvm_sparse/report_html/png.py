"""Spy plots as PNG pictures, for pages that hold them."""

from __future__ import annotations

import base64
import struct
import zlib

from ..spy import LEVELS, Spy

# The picture is the paper's colour where there is nothing: only how much ink varies.
_INK = (11, 122, 117)
_BITS = 4
_PALETTE = 3


def data_uri(picture: Spy) -> str:
    """Write a picture as a PNG inside an address."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def png(picture: Spy) -> bytes:
    """Write a picture as a PNG: a pixel a cell, ink that gets more opaque (ISO/IEC 15948)."""
    levels = picture.levels()
    rows = (levels[at : at + picture.width] for at in range(0, len(levels), picture.width))
    opacity = bytes(round(255 * level / (LEVELS - 1)) for level in range(LEVELS))
    header = struct.pack(">IIBBBBB", picture.width, picture.height, _BITS, _PALETTE, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"PLTE", bytes(_INK) * LEVELS)
        + _chunk(b"tRNS", opacity)
        # Every row begins with the number of its filter: none.
        + _chunk(b"IDAT", zlib.compress(b"".join(b"\0" + _halved(row) for row in rows), 9))
        + _chunk(b"IEND", b"")
    )


def _halved(row: bytes) -> bytes:
    """Put two levels into a byte, the first one in its high half."""
    padded = row + b"\0" * (len(row) % 2)
    return bytes(a << _BITS | b for a, b in zip(padded[::2], padded[1::2], strict=True))


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
