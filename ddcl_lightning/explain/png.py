"""An image as a PNG data URI, without an imaging library: the same bytes everywhere."""

import base64
import struct
import zlib

import numpy as np

from ddcl_lightning.explain.explanation import Image


def png_bytes(image: Image) -> bytes:
    """An image ``(H, W)`` grey or ``(H, W, 3)`` RGB, uint8, as a PNG file (ISO/IEC 15948)."""
    height, width = image.shape[:2]
    rows = np.ascontiguousarray(image).reshape(height, -1)
    lines = np.hstack([np.zeros((height, 1), np.uint8), rows])  # filter type 0 before every line
    colour = 0 if image.ndim == 2 else 2
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def data_uri(image: Image) -> str:
    """The PNG of an image as a ``data:`` URI."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
