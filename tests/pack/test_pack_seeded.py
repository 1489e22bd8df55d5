"""Seeds in place of values: a model that is a mask and a seed is a file like any other."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from damage import mutated
from gossamer import nets
from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.seeds import FACTORS, SCALES, SCHEMES, Seed, init_
from gossamer.pack import PROFILES, Archive, describe, load_into, pack, pack_bytes, unpack
from gossamer.pack.coders.limits import VERSION, Reader, varint
from gossamer.pack.format.container import OWN, Entry, Header, file_chunks
from gossamer.pack.format.lzma_bytes import encode_lzma
from gossamer.pack.format.section import parse
from gossamer.pack.format.values import BY_TORCH, to_bits
from gossamer.pack.read.decode import decode_section

F32 = BY_TORCH[torch.float32]
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def masked(seed: Seed, shape: tuple[int, ...], density: float, mask_seed: int = 0) -> torch.Tensor:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(mask_seed)) < density
    return torch.where(keep, seed.values(shape), torch.zeros(()))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return np.array_equal(to_bits("a", a)[1], to_bits("b", b)[1]) and a.shape == b.shape


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_round_trip_and_size(profile: str, scheme, density: float) -> None:
    seed = Seed(scheme, 77, 3, 0.06, 1 / density)
    weight = masked(seed, (120, 90), density)
    data = pack_bytes({"w": weight}, profile=profile, seeds={"w": seed})
    assert same(unpack(data)["w"], weight)
    assert data[4] == 2
    # the mask's entropy, and some
    entropy = -(density * np.log2(density) + (1 - density) * np.log2(max(1 - density, 1e-9)))
    assert len(data) < 120 * 90 * entropy / 8 * (3 if profile == "huffman" else 1.1) + 120
    with Archive(data) as archive:
        row = archive.info("w")
        assert row["codec"].startswith(f"seeded({scheme}) ")
        assert row["nonzeros"] == int((weight != 0).sum())
        assert row["distinct"] == len(np.unique(weight.numpy()))
        assert sum(row["parts"].values()) == row["bytes"]
        assert row["parts"]["seed"] == 1 + 1 + 8 + 1 + 4 + 4 * (density < 1)
        assert sum(archive.parts().values()) == len(data)
        assert describe(archive)[0]["shape"] == [120, 90]


def test_a_model_is_loaded_like_any_other(tmp_path: Path) -> None:
    model = nets.build("lenet-300-100", seed=0)
    seeds = init_(model, 5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in seeds:
                p.copy_(masked(seeds[name], tuple(p.shape), 0.4))
    path = tmp_path / "mask.gsm"
    with pack(model, path, metadata={"epochs": 3}, seeds=seeds) as archive:
        archive.verify()
        assert archive.metadata == {"epochs": 3}
        out = torch.full((100, 300), 7.0)
        archive.read_into("ip2.weight", out)
        assert same(out, model.state_dict()["ip2.weight"])
    assert path.stat().st_size < 266_200 / 8 + 600
    other = nets.build("lenet-300-100", seed=1)
    load_into(path, other)
    for name, value in model.state_dict().items():
        assert same(other.state_dict()[name], value)


def test_tied_weights_are_stored_once() -> None:
    seed = Seed("normal", 1, 0, 0.1)
    weight = masked(seed, (40, 40), 0.5)
    data = pack_bytes({"a": weight, "b": weight}, seeds={"a": seed})
    found = unpack(data)
    assert found["a"] is found["b"]
    assert same(found["a"], weight)


def test_a_seed_is_used_only_where_it_is_smallest() -> None:
    seed = Seed("signed_constant", 1, 0, 0.5)
    nothing = torch.zeros(50, 50)
    single = torch.zeros(50, 50)
    single[3, 4] = seed.values((50, 50))[3, 4]
    tiny = seed.values((2,))
    data = pack_bytes(
        {"nothing": nothing, "single": single, "tiny": tiny, "empty": torch.empty(0, 3)},
        seeds=dict.fromkeys(("nothing", "single", "tiny", "empty"), seed),
    )
    assert data[4] == 1  # an older reader reads it
    assert data == pack_bytes(
        {"nothing": nothing, "single": single, "tiny": tiny, "empty": torch.empty(0, 3)}
    )


def test_seeds_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    seed = Seed("normal", 1, 0, 0.1)
    weight = masked(seed, (20, 20), 0.5)
    off = weight.clone()
    off[weight == 0] = -0.0  # a value of its own, not a zero
    path = tmp_path / "old.gsm"
    path.write_bytes(b"as it was")
    for tensor, given_seed, message in (
        (weight, Seed("normal", 2, 0, 0.1), r"seeds\['w'\] does not give .* of \d+ non-zero"),
        (weight, Seed("normal", 1, 1, 0.1), "does not give"),
        (weight, Seed("normal", 1, 0, 0.1, 2.0), "the factor of its mask"),
        (weight, Seed("normal", 1, 0, 0.100001), "does not give"),
        (off, seed, "does not give .*the first is -0.0"),
        (weight.half(), seed, "gives float32, the tensor is float16"),
    ):
        with pytest.raises(ArgumentError, match=message):
            pack({"w": tensor}, path, seeds={"w": given_seed})
    with pytest.raises(ArgumentError, match=r"seeds name 'v', which is no tensor.*there are: w"):
        pack({"w": weight}, path, seeds={"v": seed})
    assert path.read_bytes() == b"as it was"


@QUICK
@given(st.data())
def test_any_shape_and_mask_comes_back(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=0, max_size=4)))
    seed = Seed(
        data.draw(st.sampled_from(SCHEMES)),
        data.draw(st.integers(0, 2**64 - 1)),
        data.draw(st.integers(0, 2**63 - 1)),
        data.draw(st.floats(2.0**-64, 2.0**64)),
        data.draw(st.just(1.0) | st.floats(2.0**-24, 2.0**24)),
    )
    numel = int(np.prod(shape))
    keep = data.draw(st.lists(st.booleans(), min_size=numel, max_size=numel))
    mask = torch.tensor(keep, dtype=torch.bool).reshape(shape)
    weight = torch.where(mask, seed.values(shape), torch.zeros(()))
    made = pack_bytes({"w": weight}, profile="fast", seeds={"w": seed})
    assert same(unpack(made)["w"], weight)


# Damage and malice -----------------------------------------------------------------------------

SEED = Seed("normal", 0x1122334455667788, 300, 0.25)
RAW_MASK = b"\0\0" + bytes([1, 0, 1, 1])
KEPT = torch.tensor([[1.0, 0.0], [1.0, 1.0]])


def head(**change: bytes) -> bytes:
    """A section's bytes before the mask, from docs/format.md."""
    parts = {
        "layout": b"\x06",
        "scheme": b"\x00",
        "seed": bytes.fromhex("8877665544332211"),
        "stream": varint(300),
        "scale": struct.pack("<f", 0.25),
        "factor": b"",
    }
    return b"".join({**parts, **change}.values())


def file_with(payload: bytes, dtype: object = F32, version: int = 2) -> bytes:
    entry = Entry("w", dtype, (2, 2), OWN)  # type: ignore[arg-type]
    return b"".join(file_chunks(Header([entry], [], False, "test", version=version), [payload]))


def test_a_file_by_hand_reads() -> None:
    values = SEED.values((2, 2))
    values[0, 1] = 0
    assert same(unpack(file_with(head() + RAW_MASK))["w"], values)
    factor = struct.pack("<f", 1.5)
    scaled = file_with(head(scheme=b"\x80", factor=factor) + RAW_MASK)
    assert same(unpack(scaled)["w"], values * 1.5)
    book = b"\x01\x04\x00\x01\x01"  # dense, four, a plain code book of the value 1: all kept
    assert same(unpack(file_with(head() + book))["w"], SEED.values((2, 2)))


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"\x06", "scheme needs 1 bytes"),
        (head(layout=b"\x0e") + RAW_MASK, "layout byte 0x0e is unknown"),
        (head(scheme=b"\x03") + RAW_MASK, "scheme 0x03 is unknown to this version"),
        (head(scheme=b"\x40") + RAW_MASK, "scheme 0x40 is unknown to this version"),
        (head(scheme=b"\x83") + RAW_MASK, "scheme 0x83 is unknown to this version"),
        (head(seed=b"\0\0", stream=b"", scale=b""), "seed needs 8 bytes"),
        (head(stream=b"\xff" * 10) + RAW_MASK, "stream is a number of more than 63 bits"),
        (head(stream=b"\x80\x00") + RAW_MASK, "stream is not in its shortest form"),
        (head(scale=b"\0\0\0"), "scale needs 4 bytes"),
        (head(scale=struct.pack("<f", float("nan"))) + RAW_MASK, "scale is nan"),
        (head(scale=struct.pack("<f", float("inf"))) + RAW_MASK, "scale is inf"),
        (head(scale=struct.pack("<f", -0.25)) + RAW_MASK, "scale is -0.25"),
        (head(scale=struct.pack("<f", 0.0)) + RAW_MASK, "scale is 0.0"),
        (head(scale=struct.pack("<f", 1e-30)) + RAW_MASK, "scale is 1.0"),
        (head(scheme=b"\x80", factor=struct.pack("<f", float("nan"))) + RAW_MASK, "factor is nan"),
        (head(scheme=b"\x80", factor=struct.pack("<f", 1e9)) + RAW_MASK, "factor is 1000000000"),
        (head(), "layout needs 1 bytes"),
        (head() + head() + RAW_MASK, "a mask that is itself seeded"),
        (head() + RAW_MASK[:-1], "raw values needs 4 bytes"),
        (head() + RAW_MASK + b"\0", "1 bytes too many"),
        (head() + b"\0\0" + bytes([1, 0, 2, 1]), "a mask holds the byte 2"),
        (head() + b"\x01\x04\x00\x01\x02", "a mask holds the byte 2"),
        (head() + b"\x02\x05", "non-zero entries is 5, at most 4"),
    ],
)
def test_forged_sections(payload: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        unpack(file_with(payload))


def test_other_dtypes_and_the_empty_are_refused() -> None:
    for dtype in (torch.float16, torch.int32, torch.bool, torch.float64):
        with pytest.raises(FormatError, match="a seed gives float32, not"):
            unpack(file_with(head() + RAW_MASK, BY_TORCH[dtype]))
    with pytest.raises(FormatError, match="seeded cannot hold an empty tensor"):
        decode_section(head(), F32, (0, 3), 0, "x")


def test_scales_and_factors_up_to_their_bounds() -> None:
    for scale in SCALES:
        found = unpack(file_with(head(scale=struct.pack("<f", scale)) + RAW_MASK))["w"]
        assert same(found, Seed("normal", SEED.seed, 300, scale).values((2, 2)) * KEPT)
    for factor in FACTORS:
        payload = head(scheme=b"\x80", factor=struct.pack("<f", factor)) + RAW_MASK
        found = unpack(file_with(payload))["w"]
        assert same(found, Seed("normal", SEED.seed, 300, 0.25, factor).values((2, 2)) * KEPT)


def test_the_parts_of_a_section_add_up() -> None:
    lzma = b"\x07\x00" + encode_lzma(bytes([1, 0, 1, 1]), 1)
    for data, shape in ((head() + RAW_MASK, (2, 2)), (head() + lzma, (2, 2)), (CODED[1], (24, 40))):
        numel = shape[0] * shape[1]
        section = parse(Reader(data, "x", VERSION), F32, shape, numel)
        assert sum(section.parts.values()) == len(data)
        assert section.parts["seed"] == len(head())
        assert section.version >= 2
    assert np.count_nonzero(decode_section(head() + lzma, F32, (2, 2), 4, "x")) == 3


def test_versions() -> None:
    with pytest.raises(FormatError, match="'w' is seeded in a file of version 1"):
        unpack(file_with(head() + RAW_MASK, version=1))
    third, second = (file_with(head() + RAW_MASK, version=v) for v in (3, 2))
    assert same(unpack(third)["w"], unpack(second)["w"])
    with pytest.raises(FormatError, match=r"format version 4; .* reads versions 1 to 3.*install"):
        unpack(file_with(head() + RAW_MASK, version=4))
    with pytest.raises(FormatError, match="format version 0"):
        unpack(file_with(head() + RAW_MASK, version=0))


def test_flipped_bytes_and_truncations_are_noticed() -> None:
    weight = masked(SEED, (9, 14), 0.5)
    data = pack_bytes({"w": weight}, seeds={"w": SEED})
    assert data[4] == 2
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            with pytest.raises(FormatError):
                unpack(bytes(damaged))
    for size in range(len(data)):
        with pytest.raises(FormatError):
            Archive(data[:size])


def test_claims_are_checked_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("w", F32, (1 << 20, 1 << 20), OWN)
    section = head() + b"\x01" + varint(1 << 40) + b"\x00\x01\x01"
    data = b"".join(file_chunks(Header([entry], [], False, "test", version=2), [section]))
    with pytest.raises(FormatError, match="claims 4398046511104 bytes"):
        Archive(data)

    def never(*_: object) -> None:
        raise AssertionError("values were made for a section that is not sound")

    monkeypatch.setattr("gossamer.pack.read.decode.fill", never)
    for bad in (head() + RAW_MASK[:-1], head(scheme=b"\x05") + RAW_MASK, head() + b"\x02\x05"):
        with pytest.raises(FormatError):
            unpack(file_with(bad))


def coded() -> list[bytes]:
    """Sections whose masks are in several layouts."""
    out = []
    for density, profile in ((0.05, "fast"), (0.3, "smallest"), (0.3, "huffman"), (0.6, "fast")):
        weight = masked(SEED, (24, 40), density)
        with Archive(pack_bytes({"w": weight}, profile=profile, seeds={"w": SEED})) as archive:
            out.append(archive._section(0, "w"))
    return out


CODED = coded()


def test_several_layouts_are_damaged() -> None:
    assert all(section[0] == 6 for section in CODED)
    assert len({section[len(head())] & 7 for section in CODED}) >= 3


@QUICK
@given(st.data())
def test_mutated_sections_give_an_error_or_a_tensor(data: st.DataObject) -> None:
    section = mutated(data, data.draw(st.sampled_from(CODED)))
    try:
        bits = decode_section(section, F32, (24, 40), 960, "x")
    except FormatError:
        return
    assert bits.shape == (960,)
    assert bits.dtype == np.uint32
