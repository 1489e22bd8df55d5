"""Texts for language models: windows of tokens, each with the same window one token later."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from itertools import repeat
from pathlib import Path

import numpy as np
import torch

from gossamer.core.errors import ArgumentError, DatasetError
from gossamer.datasets.base import Dataset, Split, balanced, held_back
from gossamer.datasets.fetch import fetch

__all__ = ["text"]

UNKNOWN = "<unk>"  # token 0: what training has not seen, or too rarely

_NAMED = {  # name -> (md5, folder of the file, its name there)
    "tiny-shakespeare": (
        "6fb458f1232090904fb40fe944165e91",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare",
        "input.txt",
    ),
    "war-and-peace": (
        "c12bc0d6a5530c4d6878952f5c3d76b9",
        "https://cs.stanford.edu/people/karpathy/char-rnn",
        "warpeace_input.txt",
    ),
}
_WORD = re.compile(r"\n|\w+(?:['’]\w+)*|[^\w\s]")


def text(
    source: str,
    *,
    level: str = "char",
    bptt: int = 64,
    vocabulary: int | None = None,
    root: str | Path | None = None,
    validation: float | int | None = None,
    seed: int = 0,
    download: bool = True,
    subset: int | None = None,
) -> Dataset:
    """A language-model dataset: inputs and targets of shape (N, bptt), int64.

    The last tenth of the text tests, the windows before it validate, the rest train, all
    contiguous; the network starts each window from a zero state.

    Args:
        source: ``tiny-shakespeare``, ``war-and-peace``, or a path to a UTF-8 text.
        level: "char", or "word" (words, punctuation marks and line ends).
        bptt: tokens in a window, through which gradients flow.
        vocabulary: keep so many of the most frequent training tokens; None: all characters, or
            10,000 words. The others become token 0, ``<unk>``.
        validation: fraction or number of the non-test windows; None: a tenth.
        seed: of ``subset`` only.

    Raises :class:`ArgumentError` for a bad option, :class:`DatasetError` for a text that is
    missing, not UTF-8 or too short.
    """
    if level not in ("char", "word"):
        raise ArgumentError(f"level={level!r} is not one of 'char', 'word'")
    if bptt < 1:
        raise ArgumentError(f"bptt={bptt} must be at least 1 token")
    if vocabulary is not None and vocabulary < 1:
        raise ArgumentError(f"vocabulary={vocabulary} must be at least 1 token")
    path = _find(source, root, download)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise DatasetError(f"text {path} is no readable UTF-8: {e}") from e
    tokens = list(content) if level == "char" else _WORD.findall(content)
    windows = (len(tokens) - 1) // bptt
    testing = windows // 10
    wanted = 0.1 if validation is None else validation
    rest = windows - testing
    held = held_back(wanted, rest) if testing else 0
    if not held:
        raise DatasetError(
            f"text {path}: {len(tokens)} tokens make {windows} windows of bptt={bptt}; too few "
            f"for train, validation={wanted} and test. Lower bptt, or take a longer text"
        )
    training = rest - held
    limit = vocabulary if vocabulary is not None else (10_000 if level == "word" else None)
    counts = Counter(tokens[: training * bptt])
    words = [w for w, _ in sorted(counts.items(), key=lambda wc: (-wc[1], wc[0]))[:limit]]
    known = {w: i for i, w in enumerate([UNKNOWN, *words])}
    number = windows * bptt + 1
    ids = torch.from_numpy(np.fromiter(map(known.get, tokens, repeat(0)), np.int64, number))
    inputs, targets = ids[:-1].view(windows, bptt), ids[1:].view(windows, bptt)

    def part(first: int, last: int) -> Split:
        return Split(inputs[first:last], targets[first:last])

    return Dataset(
        f"text:{source}",
        balanced(part(0, training), subset, len(known), seed=seed),
        part(training, rest),
        part(rest, windows),
        len(known),
        vocabulary=tuple(known),
        task="language-model",
    )


def _find(source: str, root: str | Path | None, download: bool) -> Path:
    path = Path(source).expanduser()
    if source not in _NAMED:
        if path.is_file():
            return path
        raise DatasetError(
            f"text {source!r} is no file ({path.absolute()}), and not one of {', '.join(_NAMED)}"
        )
    md5, folder, remote = _NAMED[source]
    path = fetch(
        "text",
        f"{source}.txt",
        md5=md5,
        mirrors=[folder],
        remote=remote,
        root=root,
        download=download,
    )
    with open(path, "rb") as f:  # put there by hand, or cut short: another text trains as well
        found = hashlib.file_digest(f, "md5").hexdigest()
    if found != md5:
        raise DatasetError(
            f"{path} has md5 {found}, that of {source} is {md5}; delete it, and fetch it again, or "
            f"name it by its path: text:{path}"
        )
    return path
