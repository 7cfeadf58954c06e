"""PNG files that are written without a library."""

import struct
import zlib

import numpy as np
import pytest

from ddcl_lightning.explain.png import data_uri, png_bytes


@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 3)])
def test_png_is_read_back(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = png_bytes(image)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, chunks = 8, {}
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + size
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (shape[1], shape[0])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(shape[0], -1)
    assert (lines[:, 0] == 0).all()
    assert (lines[:, 1:].reshape(shape) == image).all()
    assert data_uri(image).startswith("data:image/png;base64,")
