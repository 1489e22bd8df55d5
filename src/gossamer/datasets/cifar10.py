"""CIFAR-10 (Krizhevsky 2009): the official archives, or lossless WebP atlases of 1,000 images.

Decoded once into a uint8 file in the user's cache, and mapped from there; normalised by the batch.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import DatasetError, GossamerError
from gossamer.core.files import replacing, sha256
from gossamer.core.locate import cache_folder, places
from gossamer.datasets.base import Dataset, Split, balanced, carve
from gossamer.datasets.fetch import fetch

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "cifar10", "crop_and_flip"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_BINARY = ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")
_PYTHON = ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")
_MIRRORS = ("https://www.cs.toronto.edu/~kriz",)
_DIGEST = 64  # hexadecimal digits of a SHA-256
_EACH = 10_000  # images in a batch of the official archives
_BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]

Decoded = tuple[np.ndarray, np.ndarray]  # (N, 3, 32, 32) uint8 and (N,) uint8, train then test


def crop_and_flip(images: Tensor, generator: torch.Generator, *, pad: int = 4) -> Tensor:
    """A random crop after zero padding, and a mirror image half of the time, for each image.

    images: (N, C, H, W), any dtype; a new tensor of the same kind is returned.
    """
    n, _, h, w = images.shape
    shift = torch.randint(0, 2 * pad + 1, (2, n), generator=generator, device=generator.device)
    flip = torch.rand(n, generator=generator, device=generator.device) < 0.5
    shift, flip = shift.to(images.device), flip.to(images.device)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    # All (2 pad + 1)^2 crops as one view without a copy: (N, C, dy, dx, H, W); one gather picks.
    crops = padded.unfold(2, h, 1).unfold(3, w, 1)
    picked = crops[torch.arange(n, device=images.device), :, shift[0], shift[1]]
    return torch.where(flip.view(n, 1, 1, 1), picked.flip(3), picked)


def cifar10(
    *,
    root: str | Path | None = None,
    validation: float | int | None = None,
    seed: int = 0,
    download: bool = True,
    subset: int | None = None,
) -> Dataset:
    """CIFAR-10: (N, 3, 32, 32), ImageNet's mean and deviation, 5,000 of the 50,000 validate.

    Augmentation pads by 4, crops and mirrors. Takes the first it finds of ``cifar10/*.webp``,
    ``cifar-10-batches-bin/``, ``cifar-10-binary.tar.gz`` and ``cifar-10-python.tar.gz``; else
    downloads the binary archive.
    """
    sources, decode = _source(root, download)
    images, labels = _cached(sources, decode)
    pixels, targets = torch.from_numpy(images), torch.from_numpy(labels).long()
    split = Split(pixels, targets, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    train, held = carve(split.take(slice(0, 50_000)), validation, default=5000, seed=seed)
    return Dataset(
        "cifar10",
        balanced(train, subset, 10, seed=seed),
        held,
        split.take(slice(50_000, None)),
        10,
        augment=crop_and_flip,
    )


def _source(root: str | Path | None, download: bool) -> tuple[list[Path], Callable[[], Decoded]]:
    folders = [f for place in places(root) for f in (place / "cifar10", place)]
    for folder in folders:
        if (folder / "train_00.webp").is_file():
            files = [folder / f"train_{i:02}.webp" for i in range(50)]
            files += [folder / f"test_{i:02}.webp" for i in range(10)]
            files += [folder / f"{half}_labels.npy" for half in ("train", "test")]
            return files, partial(_atlases, files)
        binary = folder / "cifar-10-batches-bin"
        if (binary / "data_batch_1.bin").is_file():
            parts = [binary / f"{name}.bin" for name in _BATCHES]
            return parts, partial(_records, str(binary), map(_read, parts))
        if (folder / _BINARY[0]).is_file():
            break
        if (folder / _PYTHON[0]).is_file():
            archive = folder / _PYTHON[0]
            return [archive], partial(_pickles, archive)
    name, md5 = _BINARY
    archive = fetch("cifar10", name, md5=md5, mirrors=_MIRRORS, root=root, download=download)
    return [archive], lambda: _records(
        str(archive), _members(archive, md5, [f"cifar-10-batches-bin/{n}.bin" for n in _BATCHES])
    )


def _cached(sources: list[Path], decode: Callable[[], Decoded]) -> Decoded:
    # The cache belongs to these very files: their names, sizes and times are part of its name.
    missing = [str(p) for p in sources if not p.is_file()]
    if missing:
        raise DatasetError(f"CIFAR-10 is incomplete, missing: {', '.join(missing[:5])}")
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in sources]
    mark = hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
    path = cache_folder() / f"cifar10-{mark}.npy"
    cached = _map(path)
    if cached is None:
        images, labels = decode()
        # One file, so that images and labels cannot part: each row is its label, then its pixels.
        rows = np.empty((len(images), 3073), dtype=np.uint8)
        rows[:, 0], rows[:, 1:] = labels, images.reshape(len(images), -1)
        cached = rows
        try:
            _write_atomic(path, rows)
        except (OSError, GossamerError) as e:
            warnings.warn(f"{path} cannot be written ({e}); decoding again next time", stacklevel=4)
        else:
            cached = _map(path)
            if cached is None:
                cached = rows
    return cached[:, 1:].reshape(-1, 3, 32, 32), np.ascontiguousarray(cached[:, 0])


def _map(path: Path) -> np.ndarray | None:
    try:
        with open(path, "rb") as f:
            if not _sound(f):
                return None
        # Copy-on-write: torch wants writable memory, the file stays as it is.
        rows = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    sound = rows.dtype == np.uint8 and rows.shape == (60_000, 3073) and rows[:, 0].max() <= 9
    return rows if sound else None


def _write_atomic(path: Path, array: np.ndarray) -> None:
    # Two processes may decode at once, and either result will do.
    with replacing(path, make_folder=True) as f:
        np.save(f, array)
        f.write(sha256(f, f.tell()))


def _sound(f: BinaryIO) -> bool:
    # Whether a cache ends in the SHA-256 of all before; older ones, and damaged ones, do not.
    size = f.seek(0, os.SEEK_END) - _DIGEST
    return size > 0 and sha256(f, size) == f.read()


def _check(images: np.ndarray, labels: np.ndarray, where: str) -> Decoded:
    if images.shape != (60_000, 3, 32, 32) or labels.shape != (60_000,):
        raise DatasetError(
            f"{where}: {images.shape} images and {labels.shape} labels, CIFAR-10 has 60000"
        )
    if labels.max() > 9:
        raise DatasetError(f"{where}: label {labels.max()}, allowed are 0 to 9")
    return images, labels


def _atlases(files: list[Path]) -> Decoded:
    from PIL import Image

    def image(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as f:
                if f.size != (800, 1280):
                    raise DatasetError(f"{path}: {f.size} pixels, an atlas has (800, 1280)")
                pixels = np.asarray(f.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as e:
            raise DatasetError(f"{path} is no sound image ({e}); fetch it again") from e
        # 40 rows of 25 images -> (1000, 3, 32, 32)
        tiles = pixels.reshape(40, 32, 25, 32, 3).transpose(0, 2, 4, 1, 3)
        return tiles.reshape(1000, 3, 32, 32)

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        images = np.concatenate(list(pool.map(image, files[:60])))
    labels = []
    for path in files[60:]:
        try:
            labels.append(np.load(path, allow_pickle=False).reshape(-1))
        except (OSError, ValueError, EOFError) as e:
            raise DatasetError(f"{path} holds no labels ({e}); fetch it again") from e
    joined = np.concatenate(labels)
    if joined.dtype.kind not in "iu" or joined.min() < 0 or joined.max() > 9:
        raise DatasetError(f"{files[60].parent}: labels must be whole numbers from 0 to 9")
    return _check(images, joined.astype(np.uint8), str(files[0].parent))


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as f:
            return f.read(_EACH * 3073 + 1)
    except OSError as e:
        raise DatasetError(f"{path} cannot be read: {e}") from e


def _members(archive: Path, md5: str, names: list[str]) -> Iterator[bytes]:
    # The named members of a published archive, in order; nothing is extracted to disk.
    with open(archive, "rb") as f:
        found = hashlib.file_digest(f, "md5").hexdigest()
    if found != md5:
        raise DatasetError(
            f"{archive} has md5 {found}, published is {md5}; delete it, and fetch it again"
        )
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name in names:
                member = tar.extractfile(name)
                if member is None:
                    raise DatasetError(f"{archive}: {name} is no file")
                yield member.read(_EACH * 3200)
    except (tarfile.TarError, KeyError, EOFError, OSError, zlib.error) as e:
        raise DatasetError(f"{archive} cannot be read ({e}); fetch it again") from e


def _records(where: str, parts: Iterator[bytes]) -> Decoded:
    # The binary version: per image one label byte, then 3 x 32 x 32 pixels.
    blocks = []
    for part in parts:
        if len(part) != _EACH * 3073:
            raise DatasetError(
                f"{where}: a batch of {len(part)} bytes, expected {_EACH * 3073}; fetch it again"
            )
        blocks.append(np.frombuffer(part, dtype=np.uint8).reshape(_EACH, 3073))
    rows = np.concatenate(blocks)
    return _check(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].copy(), where)


class _Unpickler(pickle.Unpickler):
    """Arrays, dictionaries, lists and bytes only; anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed here")


def _pickles(archive: Path) -> Decoded:
    # The Python version. Its checksum is that of the published file before a byte is unpickled.
    images, labels = [], []
    names = [f"cifar-10-batches-py/{n}" for n in _BATCHES]
    for part in _members(archive, _PYTHON[1], names):
        try:
            batch = _Unpickler(io.BytesIO(part), encoding="bytes").load()
            images.append(np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
            labels.append(np.asarray(batch[b"labels"], dtype=np.uint8))
        except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError) as e:
            raise DatasetError(f"{archive}: a batch does not read ({e}); fetch it again") from e
    return _check(np.concatenate(images), np.concatenate(labels), str(archive))
