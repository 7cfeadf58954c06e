"""Tiny files in the formats of the real data sets, so that recipes that want them run without a network."""

import gzip
import io
import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image

GOOD, BAD = ("good", "great", "wonderful"), ("bad", "dull", "boring")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def text_file(path: Path, classes: int = 2, train: int = 120, test: int = 24, test_name: str = "test") -> Path:
    """Sentences about films, ``{"split", "label", "text"}`` a line; the words follow the label, modulo 2."""
    generator = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for place in range(train + test):
            label = place % classes
            word = generator.choice(GOOD if label % 2 else BAD)
            text = f"{generator.choice(['the', 'a', 'very'])} {word} film {'story ' * int(generator.integers(1, 6))}"
            row = {"split": "train" if place < train else test_name, "label": label, "text": f"{text}{label}"}
            file.write(json.dumps(row) + "\n")
    return path


def idx_folder(folder: Path, train: int = 60, test: int = 20) -> Path:
    """The four gzipped files of MNIST and its relatives; a square in the corner says the class."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("train", train), ("t10k", test)):
        labels = (np.arange(size) % 10).astype(np.uint8)
        images = generator.integers(0, 60, (size, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[: 2 * label + 2, : 2 * label + 2] = 250
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
            with gzip.open(folder / f"{name}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())
    return folder


def jpeg_file(path: Path, train: int = 60, test: int = 20) -> Path:
    """CIFAR-10 as JPEG bytes in one file; the colour says the class."""
    arrays: dict[str, np.ndarray] = {"classes": np.array(CIFAR10)}
    for name, size in (("train", train), ("test", test)):
        labels = np.arange(size) % 10
        encoded = []
        for label in labels:
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (25 * int(label), 255 - 25 * int(label), 90)).save(buffer, "JPEG")
            encoded.append(buffer.getvalue())
        arrays[f"jpeg_{name}"] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        arrays[f"offset_{name}"] = np.cumsum([0, *map(len, encoded)])
        arrays[f"y_{name}"] = labels
    np.savez(path, **arrays)
    return path
