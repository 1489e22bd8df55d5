"""Write golden files: PYTHONPATH=tests python tests/pack/golden/make.py NAME... (or those missing).

They were written once and are read by every later release; a file that no longer reads means a
new format version, not a new golden file.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from gossamer.core.seeds import SCHEMES, Seed
from gossamer.pack import pack_bytes, unpack
from gossamer.pack.coders.table import register
from gossamer.pack.format.container import OWN, Entry, Header, file_chunks
from gossamer.pack.format.lzma_bytes import encode_lzma
from gossamer.pack.format.values import BY_TORCH, analyse, to_bits
from gossamer.pack.write.layouts import (
    Settings,
    bitmap_section,
    context_section,
    dense_section,
    gaps_section,
    paper_section,
    row_scan,
    scaled_section,
    seeded_section,
    transposed,
)
from gossamer.pack.write.scales import find_scales
from toy_coder import Toy

HERE = Path(__file__).parent


def shared(shape: tuple[int, ...], density: float, values: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    book = np.sort(rng.normal(size=values).astype(np.float32))
    weight = np.where(rng.random(shape) < density, book[rng.integers(0, values, shape)], 0)
    return torch.from_numpy(weight.astype(np.float32))


def state() -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(7)
    grid = torch.from_numpy(np.rint(rng.normal(size=(20, 15)) * 4).astype(np.float32))
    fc = shared((30, 40), 0.1, 15, 1)
    return {
        "conv.weight": shared((6, 5, 3, 3), 0.3, 20, 0),
        "conv.bias": torch.from_numpy(rng.normal(size=6).astype(np.float32)),
        "fc.weight": fc,
        "fc.bias": torch.from_numpy(rng.normal(size=30).astype(np.float32)),
        "tied.weight": fc,
        "grid": grid * 0.0173,
        "grid.half": (grid * 0.25).half(),
        "grid.bf16": (grid * 0.3).bfloat16(),
        "double": grid.double() * 0.1,
        "ternary": torch.sign(grid) * 0.37,
        "pruned": shared((20, 30), 0.15, 10_000, 2),
        "noise": torch.from_numpy(rng.normal(size=(12, 20)).astype(np.float32)),
        "int8": torch.from_numpy(rng.integers(-5, 6, (20, 20)).astype(np.int8)),
        "mask": torch.from_numpy(rng.random((20, 30)) < 0.1),
        "zeros": torch.zeros(40, 40),
        "constant": torch.full((9, 9), -2.5),
        "empty": torch.empty(0, 3),
        "batches": torch.tensor(782),
        "odd": torch.tensor([0.0, -0.0, float("nan"), float("inf")] * 40),
        "Größe": torch.tensor(1.5),
    }


def layouts(*, context: bool) -> bytes:
    """A tensor of every layout and flag."""
    rng = np.random.default_rng(3)
    keep = rng.random((12, 40)) < np.where(np.arange(40) < 20, 0.05, 0.5)
    book = np.array([-1.5, -0.2, 0.3, 0.7], np.float32)
    tensors = {
        "few": np.where(keep, book[rng.integers(0, 4, (12, 40))], np.float32(0)),
        "many": np.where(keep, rng.normal(size=(12, 40)), 0).astype(np.float32),
    }
    columns, rows = (np.arange(40) >= 20).astype(np.uint8), (np.arange(12) >= 4).astype(np.uint8)
    entries, payloads = [], []
    for name, array in tensors.items():
        dtype, bits = to_bits(name, torch.from_numpy(array))
        v, s = analyse(bits, dtype, (12, 40)), Settings()
        scan = row_scan(v)
        made = {"context": context_section(v)} if context and v.book is not None else {}
        if not context:
            for kind, section in (("gaps", gaps_section), ("bitmap", bitmap_section)):
                made[kind] = section(v, s, scan, None)
                made[f"{kind}.classes"] = section(v, s, scan, columns)
                made[f"{kind}.turned"] = section(v, s, transposed(scan), None)
                made[f"{kind}.turned.classes"] = section(v, s, transposed(scan), rows)
        if v.book is not None and not context:
            made["dense"] = dense_section(v, s, scan, None)
            made["dense.classes"] = dense_section(v, s, scan, columns)
            made["dense.turned.classes"] = dense_section(v, s, transposed(scan), rows)
            made["fixed"] = paper_section(v, s)
        for kind, payload in made.items():
            entries.append(Entry(f"{name}.{kind}", dtype, (12, 40), OWN))
            payloads.append(bytes(payload))
    return b"".join(file_chunks(Header(entries, [], False, "golden"), payloads))


def grids() -> bytes:
    """Small tensors on grids of float32 and float64 steps, zero among them and not."""
    k = torch.arange(-40, 60, 3).double()
    kinds = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
    made = {name: (k[k != 2] * 0.0123).to(dtype) for name, dtype in kinds.items()}
    step = float(torch.tensor(0.0123, dtype=torch.float32))
    return pack_bytes(made | {"single": ((k + 1) * step).float()}, allow_nonfinite=True)


def seeded() -> bytes:
    """Seeds of every scheme, with and without a factor, their masks in several layouts."""
    rng = np.random.default_rng(5)
    mask = torch.from_numpy(rng.random((12, 40)) < np.where(np.arange(40) < 20, 0.1, 0.6))
    dtype, bits = to_bits("mask", mask)
    v, s = analyse(bits, dtype, (12, 40)), Settings()
    scan, columns = row_scan(v), (np.arange(40) >= 20).astype(np.uint8)
    masks = {
        "raw": b"\0\0" + bits.tobytes(),
        "dense": dense_section(v, s, scan, None),
        "gaps.classes": gaps_section(v, s, scan, columns),
        "bitmap.turned": bitmap_section(v, s, transposed(scan), None),
        "fixed": paper_section(v, s),
        "context": context_section(v),
    }
    entries, payloads = [], []
    for number, (kind, section) in enumerate(masks.items()):
        scheme = SCHEMES[number % 3]
        seed = Seed(scheme, (1 << 64) - 1 - number, number << 40, 0.07, 1.0 + 0.5 * (number > 2))
        entries.append(Entry(f"{scheme}.{kind}", BY_TORCH[torch.float32], (12, 40), OWN))
        payloads.append(seeded_section(seed, bytes(section)))
    return b"".join(file_chunks(Header(entries, [], False, "golden", version=2), payloads))


def names() -> bytes:
    """Version 3: a symbol coder told by name in every stream that there is, and LZMA."""
    rng = np.random.default_rng(11)
    book = np.array([-1.5, -0.2, 0.3, 0.7], np.float32)
    keep = rng.random((12, 40)) < np.where(np.arange(40) < 20, 0.05, 0.5)
    few = np.where(keep, book[rng.integers(0, 4, (12, 40))], np.float32(0))
    columns, s = (np.arange(40) >= 20).astype(np.uint8), Settings(coders=("toy",))
    dtype, bits = to_bits("few", torch.from_numpy(few))
    v = analyse(bits, dtype, (12, 40))
    mask_dtype, mask = to_bits("mask", torch.from_numpy(keep))
    m = analyse(mask, mask_dtype, (12, 40))
    rows = np.resize(rng.normal(size=(3, 40)).astype(np.float32).view(np.uint32), 480)
    lzma = {t: b"\x07\x00" + encode_lzma(d, n) for t, d, n in (("f", rows, 4), ("m", mask, 1))}
    seed = Seed("normal", 9, 1, 0.1, 1.0)
    made = {
        "dense": (dtype, dense_section(v, s, row_scan(v), None)),
        "dense.classes": (dtype, dense_section(v, s, row_scan(v), columns)),
        "gaps.classes": (dtype, gaps_section(v, s, row_scan(v), columns)),
        "bitmap": (dtype, bitmap_section(v, Settings(coders=("fixed", "toy")), row_scan(v), None)),
        "fixed": (dtype, paper_section(v, s)),
        "lzma": (dtype, lzma["f"]),
        "lzma.bool": (mask_dtype, lzma["m"]),
        "seeded.lzma": (dtype, seeded_section(seed, lzma["m"])),
        "seeded.gaps": (dtype, seeded_section(seed, bytes(gaps_section(m, s, row_scan(m), None)))),
        "old": (dtype, gaps_section(v, Settings(), row_scan(v), None)),
    }
    entries = [Entry(name, kind, (12, 40), OWN) for name, (kind, _) in made.items()]
    header = Header(entries, [], False, "golden", version=3)
    return b"".join(file_chunks(header, [bytes(section) for _, section in made.values()]))


def scaled() -> bytes:
    """Codes of every type, scales of rows, columns and groups, in every float type."""
    g = torch.Generator().manual_seed(3)
    rows, columns = torch.rand(12, 1, generator=g) + 0.01, torch.linspace(0.01, 3, 40)
    groups = (torch.rand(12, 3, generator=g) + 0.01).repeat_interleave(16, 1)[:, :40]
    codes = torch.randint(-7, 8, (12, 40), generator=g)
    wide = torch.randint(-2000, 2000, (12, 40), generator=g)
    zeros = torch.where(codes == 1, -0.0, codes * rows)
    zeros[3] = 0
    made = {
        "rows": codes * rows,
        "wide": wide * rows,
        "minus": zeros,
        "columns": codes * columns,
        "groups": codes * groups,
        "float16": (codes * rows).half(),
        "bfloat16": (codes * rows).bfloat16(),
        "float64": codes * rows.double() / 3,
    }
    entries, payloads = [], []
    for name, tensor in made.items():
        dtype, bits = to_bits(name, tensor)
        found = find_scales(bits, dtype, (12, 40))
        assert found is not None
        scales, inner = found
        v, s = analyse(inner, scales.codes, (12, 40)), Settings()
        section = gaps_section(v, s, row_scan(v), None) if name == "wide" else context_section(v)
        entries.append(Entry(name, dtype, (12, 40), OWN))
        payloads.append(scaled_section(scales, bytes(section)))
    return b"".join(file_chunks(Header(entries, [], False, "golden", version=3), payloads))


FILES = {
    "grids": grids,
    "fast": lambda: pack_bytes(
        state(), profile="fast", metadata={"v": 1, "t": "ab" * 50}, allow_nonfinite=True
    ),
    "huffman": lambda: pack_bytes(state(), profile="huffman", metadata={}, allow_nonfinite=True),
    "layouts": lambda: layouts(context=False),
    "context": lambda: layouts(context=True),
    "seeded": seeded,
    "names": names,
    "scaled": scaled,
}


def digest(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """dtype, shape and SHA-256 of the bits, per tensor."""
    out = {}
    for name, tensor in tensors.items():
        _, bits = to_bits(name, tensor)
        shape = "x".join(map(str, tensor.shape))
        kind = str(tensor.dtype).removeprefix("torch.")
        out[name] = f"{kind} {shape} {hashlib.sha256(bits.tobytes()).hexdigest()}"
    return out


def main() -> None:
    register(Toy())
    wanted = sys.argv[1:] or [n for n in FILES if not (HERE / f"{n}.gsm").exists()]
    for name in wanted:
        data = FILES[name]()
        (HERE / f"{name}.gsm").write_bytes(data)
        text = json.dumps(digest(unpack(data)), indent=1, ensure_ascii=False) + "\n"
        (HERE / f"{name}.json").write_text(text)
        print(f"{name}.gsm: {len(data)} bytes")


if __name__ == "__main__":
    main()
