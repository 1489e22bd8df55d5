"""Files against general compressors and against the MPEG NNR reference coder, same tensors.

Run: python benchmarks/sizes.py [FILES] [--nncodec-python VENV/bin/python] [--json FILE]

FILES are .safetensors or .gsm files, or .npz files of signed ranks (0: pruned, +-m: the m-th
smallest magnitude; NAME.kernel: entries of a convolution's kernel); without any, seeded random
networks of the shapes of LeNet-300-100 and ResNet-20. Every row is a whole model and every layer
set of it. The others get what they can use: zstd and xz the float32 bytes and, separately, one
byte per weight with the code books beside; NNR (DeepCABAC, from the `nncodec` package, which
needs numpy < 2 and therefore an interpreter of its own) the signed ranks, with its best settings
tensor by tensor and one byte to say which, plus this library's own bytes for code books, biases
and header (its own headers are larger).
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zstandard
from record import record

from gossamer.experiments import Claim
from gossamer.pack import PROFILES, Archive, pack_bytes, unpack
from gossamer.pack.format.values import analyse, to_bits
from gossamer.pack.safetensors_io import load_safetensors

State = dict[str, torch.Tensor]

# Runs in the other interpreter: ranks in, bytes per tensor out. Only the compiled coder is
# loaded, so neither torch nor the rest of the package needs to be there.
NNR = """
import glob, importlib.util, json, os, sys
import numpy as np
root = importlib.util.find_spec("nncodec").submodule_search_locations[0]
path = glob.glob(os.path.join(root, "extensions", "deepCABAC*.so"))[0]
spec = importlib.util.spec_from_file_location("deepCABAC", path)
cabac = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cabac)
sizes = {}
for name, ranks in np.load(sys.argv[1]).items():
    ranks = np.ascontiguousarray(ranks, np.int32)
    skip = np.array([not row.any() for row in ranks], np.int32)
    best = None
    for unary in (2, 4, 6, 8, 11, 16, 24, 32):
        for optimise in (0, 1):
            for profile in (0, 1):
                for order in range(5 if profile == 0 else 1):
                    coder = cabac.Encoder()
                    coder.initCtxModels(unary, optimise)
                    off = (cabac.HdspMode.AlwaysOff, np.zeros(2, np.int8))
                    coder.encodeLayer(ranks, 0, order, profile, 0, profile, skip, *off, 0, 0)
                    size = len(coder.finish().tobytes())
                    best = size if best is None else min(best, size)
    sizes[name] = best
print(json.dumps(sizes))
"""


def from_ranks(path: Path) -> State:
    """Values for signed ranks: a grid where the name says uniform, else an uneven code book."""
    rng = np.random.default_rng(0)
    state: State = {}
    with np.load(path) as file:
        for name in file.files:
            if name.endswith(".kernel"):
                continue
            ranks = file[name].astype(np.int64)
            most = int(np.abs(ranks).max(initial=1))
            books = []
            for _ in range(2):
                steps = np.ones(most) if "uni" in path.stem else rng.uniform(0.5, 1.5, most)
                books.append((np.cumsum(steps) * 0.05 / most**0.5).astype(np.float32))
            if "uni" in path.stem or "ternary" in path.stem:
                books[1] = books[0]
            values = np.concatenate([-books[0][::-1], np.zeros(1, np.float32), books[1]])
            kernel = int(file[f"{name}.kernel"]) if f"{name}.kernel" in file.files else 1
            shape = ranks.shape if kernel == 1 else (len(ranks), -1, kernel)
            state[name] = torch.from_numpy(values[ranks + most]).reshape(shape)
            bias = rng.normal(size=len(ranks)).astype(np.float32) * 0.1
            state[name.removesuffix(".weight") + ".bias"] = torch.from_numpy(bias)
    return state


def synthetic(kind: str) -> State:
    """Heavy-tailed weights, columns and rows of unlike scale, 10 % kept, 31 values."""
    rng = np.random.default_rng(0)
    if kind == "lenet-300-100":
        shapes: dict[str, tuple[int, ...]] = {
            "ip1": (300, 784),
            "ip2": (100, 300),
            "ip3": (10, 100),
        }
    else:
        widths = [16] * 7 + [32] * 6 + [64] * 6
        shapes = {"conv0": (16, 3, 3, 3)}
        for i, (a, b) in enumerate(itertools.pairwise(widths), 1):
            shapes[f"conv{i}"] = (b, a, 3, 3)
        shapes["fc"] = (10, 64)
    state: State = {}
    for name, shape in shapes.items():
        weight = rng.laplace(size=shape)
        weight *= rng.gamma(2.0, size=(1, *shape[1:])) * rng.gamma(6.0, size=shape[:1]).reshape(
            -1, *[1] * (len(shape) - 1)
        )
        kept = np.abs(weight) > np.quantile(np.abs(weight), 0.9)
        edges = np.linspace(weight.min(), weight.max(), 32)
        book = (edges[1:] + edges[:-1]).astype(np.float32) / 2
        code = np.clip(np.searchsorted(edges, weight) - 1, 0, 30)
        state[f"{name}.weight"] = torch.from_numpy(np.where(kept, book[code], np.float32(0)))
        state[f"{name}.bias"] = torch.from_numpy(rng.normal(size=shape[0]).astype(np.float32))
    return state


def general(state: State) -> dict[str, int]:
    """zstd and xz, on the floats and on one byte per weight."""
    floats, codes = [], []
    for name, tensor in state.items():
        dtype, bits = to_bits(name, tensor)
        floats.append(bits.tobytes())
        v = analyse(bits, dtype, tuple(tensor.shape))
        if v.book is None or v.codes is None or len(v.book) > 255:
            codes.append(bits.tobytes())
            continue
        symbols = np.zeros(len(bits), np.uint8)
        symbols[v.positions] = v.codes + np.uint8(1)
        codes += [symbols.tobytes(), v.book.tobytes()]
    out = {}
    for what, parts in (("float32", floats), ("codes", codes)):
        data = b"".join(parts)
        out[f"zstd-19 {what}"] = len(zstandard.compress(data, 19))
        out[f"xz-9e {what}"] = len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    return out


def nnr(state: State, python: str) -> dict[str, int]:
    """Bytes of each coded tensor's ranks by DeepCABAC."""
    ranks: dict[str, np.ndarray] = {}
    for name, tensor in state.items():
        dtype, bits = to_bits(name, tensor)
        v = analyse(bits, dtype, tuple(tensor.shape))
        if tensor.ndim < 2 or v.codes is None:
            continue
        rank = np.zeros(len(bits), np.int32)
        codes = v.codes.astype(np.int32)
        rank[v.positions] = codes - v.negatives + (codes >= v.negatives)
        ranks[name] = rank.reshape(v.rows, v.cols)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ranks.npz"
        np.savez(path, **ranks)
        run = subprocess.run(
            [python, "-c", NNR, str(path)], check=True, capture_output=True, text=True
        )
    return json.loads(run.stdout)


def compare(model: str, layers: str, state: State, python: str | None) -> dict[str, object]:
    sizes = {f"gossamer {p}": len(pack_bytes(state, profile=p)) for p in PROFILES}
    others = general(state)
    if python:
        coded = nnr(state, python)
        with Archive(pack_bytes(state)) as archive:
            rest = archive.file_bytes
            for name in coded:
                parts = archive.info(name)["parts"]
                coding = ("context", "positions", "codes", "tables", "classes")
                rest -= sum(parts.get(p, 0) for p in coding)
        others["NNR"] = sum(coded.values()) + len(coded) + rest
    ours, best = min(sizes.values()), min(others.values())
    dense = sum(t.numel() * t.element_size() for t in state.values())
    return {
        "model": model,
        "layers": layers,
        "dense": dense,
        "sizes": {**sizes, **others},
        "smallest_is_gossamer": ours <= best,
        "over_best_other": ours / best,
    }


def layer_sets(state: State) -> dict[str, State]:
    weights = [n for n, t in state.items() if t.ndim >= 2]
    sets = {"all": state}
    convolutions = {n: state[n] for n in weights if state[n].ndim > 2}
    linear = {n: state[n] for n in weights if state[n].ndim == 2}
    if convolutions and linear:
        sets |= {"convolutions": convolutions, "linear": linear}
    largest = max(weights, key=lambda n: state[n].numel(), default=None)
    if largest is not None and len(weights) > 1:
        sets[largest] = {largest: state[largest]}
    return sets


def load(path: Path) -> State:
    if path.suffix == ".npz":
        return from_ranks(path)
    return unpack(path) if path.suffix == ".gsm" else load_safetensors(path)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--nncodec-python", help="interpreter that has the nncodec package")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    began = time.time()
    models = {p.stem: load(p) for p in args.files}
    models = models or {k: synthetic(k) for k in ("lenet-300-100", "resnet-20")}
    rows = []
    for model, state in models.items():
        for layers, part in layer_sets(state).items():
            row = compare(model, layers, part, args.nncodec_python)
            rows.append(row)
            sizes = ", ".join(f"{k} {v:,}" for k, v in row["sizes"].items())
            verdict = "gossamer smallest" if row["smallest_is_gossamer"] else "NOT smallest"
            print(f"{model} / {layers}: {row['dense']:,} bytes; {sizes}: {verdict}", flush=True)
    lost = [r for r in rows if not r["smallest_is_gossamer"]]
    print(f"smallest in {len(rows) - len(lost)} of {len(rows)} rows")
    worst = max(row["over_best_other"] for row in rows)
    page = "deep-compression.beyond"
    record(
        "benchmark-sizes",
        "Files against zstd-19, xz and NNR (DeepCABAC) on the same tensors.",
        began,
        [
            Claim(
                page, "rows in which the file is smallest", len(rows) - len(lost), ">=", len(rows)
            ),
            Claim(page, "largest file over the best other's", worst, "<=", 1.0),
        ],
        {"rows": rows},
        args.json,
    )
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
