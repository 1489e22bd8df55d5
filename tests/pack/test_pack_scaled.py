"""Weights of few bits with a scale for each row or group: codes and scales apart."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
import torch

from gossamer.core.errors import FormatError
from gossamer.pack import Archive, pack_bytes, unpack
from gossamer.pack.coders.limits import varint
from gossamer.pack.format.container import OWN, Entry, Header, file_chunks
from gossamer.pack.format.scales import CODES
from gossamer.pack.format.values import BY_TORCH, to_bits
from gossamer.pack.write.scales import find_scales

F32 = BY_TORCH[torch.float32]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(
    w: torch.Tensor, bits: int, group: int | None = None, axis: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor as symmetric quantizers leave it, and its integers."""
    moved = w.movedim(axis, 0)
    rows = moved.reshape(len(moved), -1)
    codes, top = torch.empty_like(rows), 2 ** (bits - 1) - 1
    made = torch.empty_like(rows)
    for start in range(0, rows.shape[1], group or rows.shape[1]):
        part = slice(start, start + (group or rows.shape[1]))
        scale = rows[:, part].abs().amax(1, keepdim=True) / top
        codes[:, part] = torch.round(rows[:, part] / scale)
        made[:, part] = codes[:, part] * scale
    back = [t.reshape(moved.shape).movedim(0, axis).contiguous() for t in (made, codes)]
    return back[0], back[1]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype and a.shape == b.shape and (to_bits("", a)[1] == to_bits("", b)[1]).all()
    )


CASES = {
    "rows of 4 bits": ((48, 96), 4, None, 0, torch.float32),
    "rows of 8 bits": ((48, 96), 8, None, 0, torch.float32),
    "rows of 2 bits": ((48, 96), 2, None, 0, torch.float32),
    "groups of 32": ((24, 128), 4, 32, 0, torch.float32),
    "groups with a rest": ((24, 77), 4, 32, 0, torch.float32),
    "groups down the columns": ((128, 24), 4, 64, 1, torch.float32),
    "filters": ((32, 16, 3, 3), 4, None, 0, torch.float32),
    "filters of a transposed convolution": ((16, 32, 3, 3), 4, None, 1, torch.float32),
    "depthwise": ((96, 1, 3, 3), 8, None, 0, torch.float32),
    "float16": ((48, 96), 4, None, 0, torch.float16),
    "bfloat16": ((48, 96), 4, None, 0, torch.bfloat16),
    "bfloat16 of 8 bits": ((24, 192), 8, None, 0, torch.bfloat16),
    "float64": ((48, 96), 4, None, 0, torch.float64),
}


@pytest.mark.parametrize("profile", ["smallest", "fast"])
@pytest.mark.parametrize("case", CASES)
def test_few_bits_take_few_bits(case: str, profile: str) -> None:
    shape, bits, group, axis, dtype = CASES[case]
    each = (drawn(shape[0], seed=1).abs() + 0.2).reshape(-1, *[1] * (len(shape) - 1))
    weight = rounded((drawn(*shape) * each).to(dtype), bits, group, axis)[0]
    data = pack_bytes({"w": weight}, profile=profile)
    assert same(unpack(data)["w"], weight)
    assert data[4] == 3
    with Archive(data) as archive:
        row = archive.info("w")
        assert sum(archive.parts().values()) == len(data)
    assert row["codec"].startswith("scaled(")
    assert row["nonzeros"] == int((to_bits("", weight)[1] != 0).sum())
    assert row["distinct"] == len(np.unique(to_bits("", weight)[1]))
    assert sum(row["parts"].values()) == row["bytes"]
    groups = weight.numel() / (group or weight.numel() / shape[axis])
    scale = 64 if dtype == torch.float64 else 32
    assert 8 * row["bytes"] < weight.numel() * (bits + 0.1) + scale * groups + 8 * 400


@pytest.mark.parametrize(("bits", "group"), [(3, None), (4, 32), (8, None), (8, 64), (12, None)])
def test_the_integers_are_those_that_the_quantizer_had(bits: int, group: int | None) -> None:
    weight, codes = rounded(drawn(20, 256), bits, group)
    found = find_scales(to_bits("w", weight)[1], F32, (20, 256))
    assert found is not None
    scales, coded = found
    assert (scales.axis, scales.group) == (0, group or 256)
    np.testing.assert_array_equal(coded.view(CODES[scales.codes.code]), codes.flatten().numpy())


def test_the_largest_step_is_taken_and_empty_rows_cost_nothing() -> None:
    scale = torch.tensor([0.3, 7.0, 0.011, 1.0])[:, None]
    codes = torch.tensor([[2, 4, -6, 0, 8], [3, 9, 6, -3, 0], [5, -7, 2, 1, 3], [0, 0, 0, 0, 0]])
    found = find_scales(to_bits("w", codes * scale)[1], F32, (4, 5))
    assert found is not None
    scales, coded = found
    assert scales.values.reshape(-1).tolist() == pytest.approx([0.6, 21.0, 0.011, 0.011])
    assert coded.view(np.int8).reshape(4, 5)[:3].tolist() == [
        [1, 2, -3, 0, 4],
        [1, 3, 2, -1, 0],
        [5, -7, 2, 1, 3],
    ]


def test_negative_zeros_stay() -> None:
    weight = rounded(drawn(40, 60), 3)[0]
    assert ((weight == 0) & weight.signbit()).any()
    data = pack_bytes({"w": weight})
    assert same(unpack(data)["w"], weight)
    with Archive(data) as archive:
        assert archive.info("w")["codec"].startswith("scaled(60)")
    assert len(data) < 40 * 60 * 3.3 / 8 + 300


@pytest.mark.parametrize("bits", [12, 13, 15])
def test_negative_zeros_beside_large_codes_stay(bits: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1), (6, 40))
    codes[:, 0] = 2 ** (bits - 1) - 1
    weight = torch.where(
        codes % 7 == 0, -0.0, codes * torch.tensor([0.3, 0.7, 1.1, 3, 5, 7])[:, None]
    )
    assert same(unpack(pack_bytes({"w": weight}))["w"], weight)


@pytest.mark.parametrize("seed", range(12))
def test_any_codes_and_scales_come_back(seed: int) -> None:
    rng = random.Random(seed)
    shape = [rng.randint(1, 24), rng.randint(1, 90), *[rng.randint(1, 3)] * rng.randint(0, 2)]
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16, torch.float64])
    bits, axis = rng.choice([2, 4, 8, 10, 13]), rng.choice([0, 1])
    weight, codes = rounded(
        drawn(*shape, seed=seed) + 1e-6, bits, rng.choice([None, 8, 32, 7]), axis
    )
    weight = (weight * 10 ** rng.uniform(-4, 3)).to(dtype)
    weight[codes % rng.choice([2, 3, 99]) == 0] *= 0  # both zeros
    for profile in ("smallest", "fast"):
        assert same(unpack(pack_bytes({"w": weight}, profile=profile))["w"], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("density", [1.0, 0.1, 0.01])
def test_natural_weights_have_no_scales(dtype: torch.dtype, density: float) -> None:
    weight = drawn(64, 96).to(dtype) * (torch.rand(64, 96) < density)
    data = pack_bytes({"w": weight})
    assert same(unpack(data)["w"], weight)
    with Archive(data) as archive:
        assert not archive.info("w")["codec"].startswith("scaled")


@pytest.mark.parametrize(
    "weight",
    [
        torch.full((8, 8), float("nan")),
        torch.full((8, 8), float("inf")),
        torch.full((8, 8), 1e-45) * torch.arange(1.0, 9),
        torch.full((8, 8), -0.0),
        torch.zeros(8, 8),
        torch.full((8, 8), 3e38) * torch.linspace(0, 1, 8),
        torch.arange(64).reshape(8, 8),
        rounded(drawn(8, 3), 4)[0],
        rounded(drawn(1, 300), 4)[0],
        torch.cat([rounded(drawn(63, 32), 4)[0], drawn(1, 32, seed=9)]),
    ],
)
def test_what_has_no_scales_or_strange_ones_is_stored_as_ever(weight: torch.Tensor) -> None:
    assert same(unpack(pack_bytes({"w": weight}, allow_nonfinite=True))["w"], weight)


def test_scales_of_few_digits_are_no_grid() -> None:
    scales = torch.tensor([129, 139, 151, 163, 179, 193, 211, 233])[:, None] / 256
    codes = torch.randint(-7, 8, (8, 400), generator=torch.Generator().manual_seed(0))
    data = pack_bytes({"w": codes * scales})
    assert same(unpack(data)["w"], codes * scales)
    assert len(data) < 8 * 400 * 4 / 8 + 100
    with Archive(data) as archive:
        assert archive.info("w")["codec"].startswith("scaled(400)")


@pytest.mark.parametrize("sparse", [False, True])
def test_one_scale_for_all_is_left_to_the_code_book(sparse: bool) -> None:
    codes = torch.round(drawn(30, 40) * 30) * (drawn(30, 40, seed=2) > sparse)
    for weight in (codes * 0.01, drawn(30, 40).sign() * 0.3):
        data = pack_bytes({"w": weight})
        assert same(unpack(data)["w"], weight)
        with Archive(data) as archive:
            assert not archive.info("w")["codec"].startswith("scaled")


# By hand, from docs/format.md ------------------------------------------------------------------


def head(**change: bytes) -> bytes:
    """Two rows of four, scales .5 and 2."""
    parts = {
        "layout": b"\x07\x01",
        "codes": b"\x04",
        "axis": b"\x00",
        "group": b"\x04",
        "length": b"\x09",
        "scales": b"\x00" + struct.pack("<2f", 0.5, 2.0),
    }
    return b"".join({**parts, **change}.values())


CODED = b"\0\0" + struct.pack("8b", 1, -2, 0, 3, 4, -5, 6, 127)


def file_of(payload: bytes, dtype: torch.dtype = torch.float32, version: int = 3) -> bytes:
    entry = Entry("w", BY_TORCH[dtype], (2, 4), OWN)
    return b"".join(file_chunks(Header([entry], [], False, "test", version=version), [payload]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_by_hand_reads(dtype: torch.dtype) -> None:
    wanted = torch.tensor([[0.5, -1, 0, 1.5], [8, -10, 12, 254]], dtype=dtype)
    assert same(unpack(file_of(head() + CODED, dtype))["w"], wanted)
    wide = b"\0\0" + struct.pack("<8h", 1, -2, 0, 3, 4, -5, 6, 127)
    assert same(unpack(file_of(head(codes=b"\x05") + wide, dtype))["w"], wanted)
    half = b"\0\0" + struct.pack("<8e", 1, -2, 0, 3, 4, -5, 6, 127)
    assert same(unpack(file_of(head(codes=b"\x01") + half, dtype))["w"], wanted)


def test_columns_and_groups_by_hand() -> None:
    codes = torch.arange(-20, 20).reshape(4, 10)
    section = b"\0\0" + codes.to(torch.int8).numpy().tobytes()
    across = b"\x07\x01\x04\x01\x04" + varint(41) + b"\0" + struct.pack("<10f", *range(1, 11))
    groups = b"\x07\x01\x04\x00\x06" + varint(33) + b"\0" + struct.pack("<8f", *range(1, 9))
    for payload, scales in (
        (across, torch.arange(1, 11)),
        (groups, torch.arange(1, 9).reshape(4, 2).repeat_interleave(6, 1)[:, :10]),
    ):
        entry = Entry("w", F32, (4, 10), OWN)
        chunks = file_chunks(Header([entry], [], False, "t", version=3), [payload + section])
        assert same(unpack(b"".join(chunks))["w"], (codes * scales).float())


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"\x07\x01", "type of the codes needs 1 bytes"),
        (b"\x0f\x01" + head()[2:] + CODED, "layout byte 0x0f is unknown"),
        (head(codes=b"\x06") + CODED, "codes of type 6, allowed are 4, 5, 1"),
        (head(axis=b"\x02") + CODED, "scales along axis 2 of a tensor of 2 dimensions"),
        (head(axis=b"\x01") + CODED, "entries of a scale is 4, at most 2"),
        (head(group=b"\x05") + CODED, "entries of a scale is 5, at most 4"),
        (head(group=b"\x03") + CODED, "3 entries to a scale, at least 4"),
        (head(group=b"\x00") + CODED, "0 entries to a scale, at least 4"),
        (head(length=b"\x7f") + CODED, "scales needs 127 bytes"),
        (head(length=b"\x08") + CODED, "raw values needs 8 bytes"),
        (head(length=b"\x0a") + CODED, "1 bytes too many"),
        (head(scales=b"\0" + struct.pack("<2f", 1, 0)) + CODED, "a scale is not positive"),
        (head(scales=b"\0" + struct.pack("<2f", -1, 1)) + CODED, "a scale is not positive"),
        (head(scales=b"\0" + struct.pack("<2f", 1, float("nan"))) + CODED, "a scale is not"),
        (head(scales=b"\0" + struct.pack("<2f", 1, float("inf"))) + CODED, "a scale is not"),
        (head(), "layout needs 1 bytes"),
        (head() + head() + CODED, "codes that are themselves scaled"),
        (head() + b"\x06" + CODED, "codes that are themselves seeded"),
        (head() + CODED[:-1], "raw values needs 8 bytes"),
        (head() + CODED + b"\0", "1 bytes too many"),
        (head(codes=b"\x01") + b"\0\0" + struct.pack("<8e", *[float("inf")] * 8), "not finite"),
    ],
)
def test_forged_sections(payload: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        unpack(file_of(payload))


def test_what_cannot_be_scaled_is_refused() -> None:
    for dtype in (torch.int32, torch.float8_e5m2):
        with pytest.raises(FormatError, match="scales give floating point of two bytes and more"):
            unpack(file_of(head() + CODED, dtype))
    for version in (1, 2):
        with pytest.raises(FormatError, match=f"unknown to version {version}"):
            unpack(file_of(head() + CODED, version=version))
    mask = bytes([6, 0]) + bytes(9) + struct.pack("<f", 1)  # a seed's
    with pytest.raises(FormatError, match="a mask that is itself scaled"):
        unpack(file_of(mask + head() + CODED))
