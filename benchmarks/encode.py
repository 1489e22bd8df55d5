"""Time to pack and to load a network of AlexNet's size (61 M weights), one thread.

Run: python benchmarks/encode.py [--scale 1.0] [--json FILE]. Figures are this machine's.

With --workers 1,2 only: time and memory of packing plain float32 weights (--tensors of 4 million
each), a fresh process for each number of workers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import torch
from record import record

from gossamer.experiments import Claim
from gossamer.pack import load_into, pack

spawned = multiprocessing.get_context("spawn")

# (out, in/groups, kh, kw) and the fraction kept by Deep Compression, Table 4.
LAYERS = {
    "conv1": ((96, 3, 11, 11), 0.84),
    "conv2": ((256, 48, 5, 5), 0.38),
    "conv3": ((384, 256, 3, 3), 0.35),
    "conv4": ((384, 192, 3, 3), 0.37),
    "conv5": ((256, 192, 3, 3), 0.37),
    "fc6": ((4096, 9216), 0.09),
    "fc7": ((4096, 4096), 0.09),
    "fc8": ((1000, 4096), 0.25),
}


def alexnet(scale: float, seed: int = 0) -> dict[str, torch.Tensor]:
    """Normal weights with columns of unlike scale, pruned by magnitude, 8 and 5 bit values."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    for name, (shape, kept) in LAYERS.items():
        if len(shape) == 2:
            shape = (max(1, round(shape[0] * scale)), shape[1])
        weight = torch.randn(shape, generator=generator)
        weight *= 0.5 + torch.rand((1, *shape[1:]), generator=generator)
        sample = weight.flatten()[:: max(1, weight.numel() // 100_000)].abs()
        edge = sample.quantile(1 - kept)
        half = 127 if len(shape) == 4 else 15
        step = (sample.max() - edge) / half
        level = ((weight.abs() - edge) / step).floor_().clamp_(0, half - 1)
        book = edge + (torch.arange(half) + torch.rand(half, generator=generator)) * step
        weight = torch.where(weight.abs() > edge, book[level.int()] * weight.sign(), 0.0)
        state[f"{name}.weight"] = weight
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    return state


class Holder(torch.nn.Module):
    """A module with the parameters of a state, to load into."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            layer, kind = name.split(".")
            if not hasattr(self, layer):
                self.add_module(layer, torch.nn.Module())
            getattr(self, layer).register_parameter(
                kind, torch.nn.Parameter(torch.empty_like(tensor))
            )


def measure(state: dict[str, torch.Tensor], profile: str, folder: Path) -> dict[str, object]:
    """``smallest`` is without the context coder: all candidates that decode fast."""
    path = folder / f"{profile}.gsm"
    options = {"context_entries": 0} if profile == "smallest" else {}
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with pack(state, path, profile=profile, **options) as archive:
            size, dense = archive.file_bytes, archive.dense_bytes
        seconds.append(time.perf_counter() - start)
    model = Holder(state)
    loads, copies = [], []
    resident = {name: torch.empty_like(t) for name, t in state.items()}
    for _ in range(5):
        start = time.perf_counter()
        load_into(path, model)
        loads.append(time.perf_counter() - start)
        start = time.perf_counter()
        for name, tensor in state.items():
            resident[name].copy_(tensor)
        copies.append(time.perf_counter() - start)
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, state[name]):
            raise SystemExit(f"{name} differs after loading")
    return {
        "profile": profile,
        "weights": dense // 4,
        "dense_bytes": dense,
        "file_bytes": size,
        "pack_seconds": min(seconds),
        "load_seconds": min(loads),
        "load_gigabytes_per_second": dense / min(loads) / 1e9,
        "memcpy_seconds": min(copies[1:]),
    }


def plain(workers: int, tensors: int, folder: str) -> None:
    """Seconds a weight, and the most memory over the network's own bytes, both in this process."""
    generator = torch.Generator().manual_seed(0)
    state = {f"{i}": torch.randn(2000, 2000, generator=generator) * 0.05 for i in range(tensors)}
    size = sum(t.nbytes for t in state.values())
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter()
    with pack(state, Path(folder, "plain.gsm"), workers=workers) as archive:
        stored = archive.file_bytes
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{workers} workers: {size // 4:,} weights, {size:,} -> {stored:,} bytes in {seconds:.1f} s"
        f" ({4e9 * seconds / size:.1f} ns a weight); most memory {peak / size:.2f} of the network "
        f"({(peak - before) / size:.2f} of it while packing)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of the rows of the fc layers")
    parser.add_argument("--profiles", default="fast,smallest,huffman")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", help="numbers, with commas between")
    parser.add_argument("--tensors", type=int, default=25)
    args = parser.parse_args()
    for workers in map(int, args.workers.split(",") if args.workers else ()):
        with tempfile.TemporaryDirectory() as folder:
            process = spawned.Process(target=plain, args=(workers, args.tensors, folder))
            process.start()
            process.join()
    if args.workers:
        return
    began = time.time()
    torch.set_num_threads(1)
    state = alexnet(args.scale)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for profile in args.profiles.split(","):
            row = measure(state, profile, Path(folder))
            rows.append(row)
            print(
                f"{profile:9} {row['weights']:,} weights: {row['dense_bytes']:,} -> "
                f"{row['file_bytes']:,} bytes, packed in {row['pack_seconds']:.2f} s, loaded in "
                f"{row['load_seconds']:.3f} s ({row['load_gigabytes_per_second']:.2f} GB/s of "
                f"float32; memcpy {row['memcpy_seconds']:.3f} s)",
                flush=True,
            )
    page = "deep-compression.beyond"
    claims = []
    for row in rows:
        if row["profile"] == "huffman":
            continue
        what = f"{row['profile']}: whole network"
        claims.append(Claim(page, f"{what} packed, s", row["pack_seconds"], "<=", 2.0))
        if row["profile"] == "fast":
            ratio = row["load_seconds"] / row["memcpy_seconds"]
            claims.append(
                Claim(page, f"{what} loaded from the file over memcpy, time", ratio, "<=", 2.0)
            )
    about = "Packing and loading a network of AlexNet's size, one thread."
    record("benchmark-encode", about, began, claims, {"rows": rows}, args.json)


if __name__ == "__main__":
    main()
