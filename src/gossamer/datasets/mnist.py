"""MNIST in its original IDX files (LeCun, Cortes and Burges), and a strict reader of IDX."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from gossamer.core.errors import DatasetError
from gossamer.datasets.base import Dataset, Split, balanced, carve
from gossamer.datasets.fetch import fetch

__all__ = ["mnist", "read_idx"]

_FILES = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
    "http://yann.lecun.com/exdb/mnist",
)
MEAN, STD = 0.1307, 0.3081  # of the training pixels scaled to [0, 1]
_LARGEST = 1 << 31  # bytes; a header that claims more is not believed


def read_idx(path: str | Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or gzip-compressed, into a uint8 array.

    The header is checked before anything is allocated, and the length must be exact.

    Raises :class:`DatasetError` for a truncated, over-long, corrupt or foreign file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else open(path, "rb") as f:
            head = f.read(4)
            if len(head) < 4 or head[:2] != b"\0\0":
                raise DatasetError(
                    f"{path} is no IDX file: it starts with {head.hex() or 'nothing'}"
                )
            if head[2] != 8:
                raise DatasetError(
                    f"{path}: IDX type 0x{head[2]:02x} is not read, only unsigned bytes (0x08)"
                )
            if not 1 <= head[3] <= 4:
                raise DatasetError(f"{path}: {head[3]} dimensions, allowed are 1 to 4")
            dims = f.read(4 * head[3])
            if len(dims) < 4 * head[3]:
                raise DatasetError(f"{path} is truncated inside its header; fetch it again")
            shape = tuple(int(n) for n in np.frombuffer(dims, dtype=">u4"))
            size = math.prod(shape)
            if size > _LARGEST:
                raise DatasetError(f"{path}: its header claims {size} bytes, allowed {_LARGEST}")
            body = f.read(size + 1)  # one more, to see that nothing follows
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DatasetError(f"{path} is truncated or corrupt ({e}); fetch it again") from e
    except OSError as e:
        raise DatasetError(f"{path} cannot be read: {e}") from e
    if len(body) != size:
        more = "more follow" if len(body) > size else f"only {len(body)} are there"
        raise DatasetError(f"{path}: {size} bytes announced for shape {shape}, {more}")
    return np.frombuffer(bytearray(body), dtype=np.uint8).reshape(shape)


def mnist(
    *,
    root: str | Path | None = None,
    validation: float | int | None = None,
    seed: int = 0,
    download: bool = True,
    subset: int | None = None,
) -> Dataset:
    """MNIST: (N, 1, 28, 28) float32, standardised; 5,000 of the 60,000 validate by default."""

    def half(name: str) -> Split:
        paths = [
            fetch("mnist", f, md5=_FILES[f], mirrors=_MIRRORS, root=root, download=download)
            for f in _FILES
            if f.startswith(name)
        ]
        images, labels = (read_idx(p) for p in paths)
        if images.ndim != 3 or images.shape[1:] != (28, 28):
            raise DatasetError(f"{paths[0]}: shape {images.shape}, MNIST has (N, 28, 28)")
        if labels.shape != images.shape[:1] or not labels.size or labels.max() > 9:
            raise DatasetError(
                f"{paths[1]}: labels of shape {labels.shape} do not fit {len(images)} images of "
                "ten classes"
            )
        pixels = torch.from_numpy(images).unsqueeze(1).float()
        pixels.mul_(1 / (255 * STD)).sub_(MEAN / STD)
        return Split(pixels, torch.from_numpy(labels).long())

    train, held = carve(half("train"), validation, default=5000, seed=seed)
    return Dataset("mnist", balanced(train, subset, 10, seed=seed), held, half("t10k"), 10)
