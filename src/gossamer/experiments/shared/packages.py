"""Networks of installed packages, which are no dependencies of the library's.

Nothing of a package is copied; it is imported from where it is installed (``pip install
--no-deps``), and what it imports besides and does not need here is stood in for.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError

__all__ = ["imported", "speaker", "tones"]


def imported(name: str, without: tuple[str, ...] = ()) -> Any:
    """A module, with stand-ins for what it imports and is not installed, or not wanted.

    Raises :class:`ArgumentError` where its package is not installed, with the command that does.
    """
    for unwanted in without:
        sys.modules[unwanted] = mock.MagicMock(__spec__=None, __path__=[])
    for _ in range(40):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as e:
            missing = e.name or ""
            if not missing or missing.split(".")[0] == name.split(".")[0]:
                raise ArgumentError(
                    f"package {name.split('.')[0]!r} is not installed; "
                    f"pip install --no-deps {name.split('.')[0]}"
                ) from e
            sys.modules[missing] = mock.MagicMock(__spec__=None, __path__=[])
    raise ArgumentError(f"{name} imports too much that is not there")


def tones(count: int, samples: int, generator: torch.Generator) -> Tensor:
    """(count, samples): three tones each, in noise, of mean 0 and deviation 1."""
    at = torch.arange(samples) / 16_000
    pitch = 80 + 800 * torch.rand(count, 3, 1, generator=generator)
    wave = torch.sin(2 * torch.pi * pitch * at).sum(1)
    wave = wave + 0.3 * torch.randn(count, samples, generator=generator)
    return (wave - wave.mean(1, keepdim=True)) / wave.std(1, keepdim=True)


def speaker(count: int, generator: torch.Generator) -> tuple[nn.Module, Tensor]:
    """Resemblyzer's trained 3-layer LSTM speaker encoder, and (count, 101, 40) spectra of tones."""
    network = imported("resemblyzer.voice_encoder").VoiceEncoder("cpu", verbose=False)
    spectra = torch.stft(
        tones(count, 16_000, generator), 400, 160, window=torch.hann_window(400),
        return_complex=True,
    ).abs()  # fmt: skip
    bands = F.adaptive_avg_pool1d(spectra.square().movedim(1, 2).reshape(-1, 1, 201), 40)
    # as the package has them: audio at -30 dBFS, triangles over hertz of unit area, bins of 40 Hz
    return network, (bands * 1e-3 / 40).reshape(count, -1, 40)
