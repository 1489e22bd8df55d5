"""Packing: every dtype and value structure round-trips bit for bit, and bytes add up."""

from __future__ import annotations

import gc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.pack import PROFILES, Archive, describe, load_into, pack, pack_bytes, unpack
from gossamer.pack.format.values import to_bits

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
]


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.numel() == 0:
        return True
    raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*raw)


def check(state: dict[str, Tensor], **options: object) -> bytes:
    data = pack_bytes(state, **options)
    out = unpack(data)
    assert list(out) == list(state)
    for name, tensor in state.items():
        assert same_bits(tensor, out[name]), name
    with Archive(data) as archive:
        parts = archive.parts()
        assert sum(parts.values()) == len(data) == archive.file_bytes
        for row in archive.rows():
            assert row["bytes"] == sum(row["parts"].values())
            assert row["distinct"] == len(np.unique(to_bits("t", state[row["name"]])[1]))
            if row["numel"]:
                raw = state[row["name"]].contiguous().reshape(-1)
                raw = raw.view(torch.uint8).view(row["numel"], raw.element_size())
                assert row["nonzeros"] == int(raw.any(dim=1).sum())
    return data


def pruned(shape: tuple[int, ...], density: float, values: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    book = np.sort(rng.normal(size=values).astype(np.float32))
    dense = book[rng.integers(0, values, shape)]
    return torch.from_numpy(np.where(rng.random(shape) < density, dense, np.float32(0)))


def structures() -> dict[str, Tensor]:
    rng = np.random.default_rng(1)
    columns = pruned((60, 80), 0.5, 12)
    columns[:, 10:50] *= torch.from_numpy(rng.random((60, 40)) < 0.05)
    grid = torch.from_numpy(np.rint(rng.normal(size=(40, 30)) * 5).astype(np.float32))
    return {
        "conv.weight": pruned((6, 5, 3, 3), 0.3, 20),
        "fc.weight": pruned((50, 70), 0.08, 31),
        "wide": pruned((3, 4000), 0.003, 5),
        "tall": pruned((900, 2), 0.2, 3),
        "columns": columns,
        "rows": columns.t(),
        "grid": grid * 0.0173,
        "grid.half": (grid * 0.25).half(),
        "ternary": torch.sign(grid) * 0.37,
        "pruned.only": pruned((90, 50), 0.1, 100_000),
        "dense": torch.from_numpy(rng.normal(size=(70, 90)).astype(np.float32)),
        "zeros": torch.zeros(9, 9),
        "constant": torch.full((4, 5), -2.5),
        "one.nonzero": torch.eye(1, 300),
        "empty": torch.empty(0, 7),
        "scalar": torch.tensor(3.25),
        "zero.scalar": torch.tensor(0.0),
        "batches": torch.tensor(782),
        "vector": pruned((2000,), 0.1, 4),
        "mask": torch.from_numpy(rng.random((40, 50)) < 0.07),
        "int8": torch.from_numpy(rng.integers(-20, 20, (40, 60)).astype(np.int8)),
        "nonzero": pruned((30, 30), 1.1, 6),
        "minus": torch.tensor([[0.0, -0.0, 1.0]] * 200),
    }


@pytest.mark.parametrize("profile", PROFILES)
def test_round_trip_of_every_structure(profile: str) -> None:
    check(structures(), profile=profile, metadata={"accuracy": 0.98})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("profile", PROFILES)
def test_round_trip_of_every_dtype(dtype: torch.dtype, profile: str) -> None:
    rng = np.random.default_rng(2)
    size = torch.empty(0, dtype=dtype).element_size()
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    raw = rng.integers(0, 2 if dtype == torch.bool else 256, (400, size), dtype=np.uint8)
    noise = torch.from_numpy(raw.reshape(-1).view(f"i{size}").copy())
    few = noise[:7][torch.from_numpy(rng.integers(0, 7, (30, 40)))]
    sparse = few * torch.from_numpy(rng.random((30, 40)) < 0.1)
    state = {n: t.to(signed).view(dtype) for n, t in [("a", noise), ("b", few), ("c", sparse)]}
    check(state, profile=profile, allow_nonfinite=True)


@pytest.mark.parametrize("profile", ["smallest", "fast"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_round_trip_of_anything(profile: str, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 9), max_size=4))
    dtype = data.draw(st.sampled_from(["u1", "i2", "f2", "f4", "f8", "i8"]))
    numel = int(np.prod(shape))
    pool = data.draw(st.lists(st.integers(0, 2 ** (8 * int(dtype[1])) - 1), min_size=1, max_size=6))
    picks = data.draw(st.lists(st.integers(-2, len(pool) - 1), min_size=numel, max_size=numel))
    bits = np.array([pool[p] if p >= 0 else 0 for p in picks], f"u{dtype[1]}")
    tensor = torch.from_numpy(bits.view(dtype).reshape(shape))
    check({"t": tensor, "ø": tensor.clone()}, profile=profile, allow_nonfinite=True)


def test_smallest_is_never_larger_and_beats_plain_codings() -> None:
    state = {"w": structures()["columns"], "f": structures()["fc.weight"]}
    sizes = {p: len(pack_bytes(state, profile=p)) for p in PROFILES}
    assert sizes["smallest"] <= min(sizes.values())
    # 50 * 70 weights at 8 % and 31 values cost about (0.4 + .08 * 5) bits each.
    assert sizes["smallest"] < 0.12 * sum(4 * t.numel() for t in state.values())


def test_overhead_of_a_small_network_is_small() -> None:
    state: dict[str, Tensor] = {}
    for name, shape in (("ip1", (300, 784)), ("ip2", (100, 300)), ("ip3", (10, 100))):
        state[f"{name}.weight"] = pruned(shape, 0.1, 31)
        state[f"{name}.bias"] = torch.randn(shape[0])
    with Archive(pack_bytes(state)) as archive:
        parts = archive.parts()
    assert parts["header"] + parts["framing"] < 160


def test_many_distinct_values_fall_back_to_planes() -> None:
    many = torch.arange(1 << 20, dtype=torch.int32).view(torch.float32).view(1 << 10, 1 << 10)
    data = check({"many": many}, profile="fast")
    assert len(data) < many.numel() * 4


def test_planes_beat_plain_floats() -> None:
    weights = torch.randn(100, 200, generator=torch.Generator().manual_seed(0))
    data = check({"w": weights}, profile="fast")
    assert len(data) < 0.88 * 4 * weights.numel()


def test_nan_is_refused_by_name_and_kept_when_asked() -> None:
    odd = torch.tensor([0x7FC00001, -1, 0x7F800000, 0, -(1 << 31)], dtype=torch.int32)
    odd = odd.view(torch.float32)
    with pytest.raises(ArgumentError, match=r"'fc\.bias' holds 3 NaN or infinite.*allow_nonfinite"):
        pack_bytes({"fc.bias": odd})
    check({"fc.bias": odd}, allow_nonfinite=True)
    check({"fc.bias": odd.repeat(500).view(50, 50)}, allow_nonfinite=True)
    bad8 = torch.tensor([0x7F, 0x01], dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(ArgumentError, match="holds 1 NaN"):
        pack_bytes({"w": bad8})


def test_refusals_name_the_argument(tmp_path) -> None:
    path = tmp_path / "m.gsm"
    with pytest.raises(ArgumentError, match="profile 'tiny' is not one of smallest"):
        pack({}, path, profile="tiny")
    with pytest.raises(ArgumentError, match=r"'c' is torch.complex64.*view_as_real"):
        pack({"c": torch.zeros(2, dtype=torch.complex64)}, path)
    with pytest.raises(ArgumentError, match=r"'s' is of layout torch.sparse_coo"):
        pack({"s": torch.eye(3).to_sparse()}, path)
    with pytest.raises(ArgumentError, match="'m' is on the meta device"):
        pack({"m": torch.empty(3, device="meta")}, path)
    with pytest.raises(ArgumentError, match="'epoch' is a int, not a tensor"):
        pack({"epoch": 3}, path)
    with pytest.raises(ArgumentError, match="cannot pack a list"):
        pack([1], path)
    with pytest.raises(ArgumentError, match="metadata is not JSON"):
        pack({}, path, metadata={"x": torch.zeros(1)})
    with pytest.raises(ArgumentError, match="metadata is not JSON"):
        pack({}, path, metadata={"x": float("nan")})
    with pytest.raises(ArgumentError, match="index_bits is 0"):
        pack({}, path, profile="huffman", index_bits=0)
    with pytest.raises(ArgumentError, match=r"'bad.udc80' is no valid text"):
        pack({"bad\udc80": torch.zeros(1)}, path)
    with pytest.raises(ArgumentError, match="has 33 dimensions"):
        pack({"deep": torch.zeros((1,) * 33)}, path)
    with pytest.raises(ArgumentError, match=r"folder .* does not exist"):
        pack({}, tmp_path / "nowhere" / "m.gsm")
    assert list(tmp_path.iterdir()) == []


def test_nothing_half_written_is_left(tmp_path, monkeypatch) -> None:
    path = tmp_path / "m.gsm"
    pack({"a": torch.ones(3)}, path).close()
    before = path.read_bytes()

    def broken(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        pack({"a": torch.zeros(3)}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.gsm"]


def test_an_archive_nobody_keeps_closes_itself(tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack({"a": torch.ones(3)}, tmp_path / "m.gsm")
        Archive(tmp_path / "m.gsm")
        gc.collect()


def test_metadata_names_and_laziness(tmp_path) -> None:
    path = tmp_path / "m.gsm"
    meta = {"dataset": "Größe", "history": [1.5, None, True], "long": "x" * 5000}
    state = structures()
    seen: list[tuple[str, int, int]] = []
    with pack(state, path, metadata=meta, progress=lambda *a: seen.append(a)) as archive:
        assert archive.metadata == meta
        assert archive.names == list(state) == list(archive)
        assert len(archive) == len(state)
        assert "fc.weight" in archive
        assert "fc" not in archive
        assert same_bits(archive.tensor("fc.weight"), state["fc.weight"])
        assert archive.dense_bytes == sum(t.numel() * t.element_size() for t in state.values())
        archive.verify()
        with pytest.raises(ArgumentError, match=r"'fc' is not in .*m.gsm.*it holds: conv.weight"):
            archive.tensor("fc")
        rows = {r["name"]: r for r in describe(archive)}
    assert [s[0] for s in seen] == list(state)
    assert seen[-1][1:] == (len(state), len(state))
    row = rows["fc.weight"]
    weight = state["fc.weight"]
    assert row["shape"] == [50, 70]
    assert row["nonzeros"] == int((weight != 0).sum())
    assert row["density"] == row["nonzeros"] / 3500
    assert row["distinct"] == len(weight.unique())
    assert row["bits_per_weight"] == 8 * row["bytes"] / 3500
    with pack({}, path) as empty:
        assert empty.metadata == {}
        assert unpack(path) == {}


def test_tied_tensors_are_stored_once(tmp_path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 30)
            self.out = nn.Linear(30, 40)
            self.out.weight = self.embed.weight

    torch.manual_seed(0)
    model, other = Tied(), Tied()
    path = tmp_path / "tied.gsm"
    with pack(model, path) as archive:
        assert archive.aliases == {"out.weight": "embed.weight"}
        rows = {r["name"]: r for r in archive.rows()}
        assert rows["out.weight"]["bytes"] == 0
        assert rows["out.weight"]["tied_to"] == "embed.weight"
        assert sum(archive.parts().values()) == archive.file_bytes
    out = unpack(path)
    assert out["out.weight"] is out["embed.weight"]
    model.load_state_dict(out)
    load_into(path, other)
    assert torch.equal(other.out.weight, model.embed.weight)
    assert other.out.weight is other.embed.weight
    # A mapping with shared storage, as state_dict() gives it.
    assert Archive(pack_bytes(model.state_dict())).aliases == {"out.weight": "embed.weight"}
    # Equal values in different tensors stay two tensors.
    assert Archive(pack_bytes({"a": torch.ones(9), "b": torch.ones(9)})).aliases == {}
    base = torch.arange(12.0)
    views = {"a": base.view(3, 4), "b": base.view(4, 3), "c": base[::2]}
    assert Archive(check(views)).aliases == {}


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def test_load_into_a_live_model(tmp_path) -> None:
    model, other = small_net(0), small_net(1)
    path = tmp_path / "net.gsm"
    pack(model, path).close()
    pointer = other[0].weight.data_ptr()
    assert load_into(path, other) is other
    assert other[0].weight.data_ptr() == pointer
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert same_bits(a, b)


def test_load_into_checks_everything_first(tmp_path) -> None:
    path = tmp_path / "net.gsm"
    pack(small_net(0), path).close()
    wrong = small_net(1)
    wrong[3] = nn.Linear(16, 4)
    before = {n: t.clone() for n, t in wrong.state_dict().items()}
    with pytest.raises(ArgumentError, match=r"'3.weight' is float32\[3, 16\] in the file and "):
        load_into(path, wrong)
    assert all(torch.equal(before[n], t) for n, t in wrong.state_dict().items())
    with pytest.raises(ArgumentError, match=r"float32.* in the file and float64"):
        load_into(path, small_net(1).double())
    with pytest.raises(ArgumentError, match=r"'1.weight' is only in the file"):
        load_into(path, nn.Sequential(small_net(1)[0]))
    part = nn.Sequential(small_net(1)[0])
    load_into(path, part, strict=False)
    assert torch.equal(part[0].weight, small_net(0)[0].weight)
    with pytest.raises(ArgumentError, match="meta device"):
        load_into(path, small_net().to("meta"))
    parametrized = small_net(1)
    nn.utils.parametrizations.weight_norm(parametrized[3])
    with pytest.raises(ArgumentError, match=r"'3.weight' is parametrized"):
        load_into(path, parametrized)
    # Damage in the last section is found before the first parameter is touched.
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    fresh = small_net(1)
    before = {n: t.clone() for n, t in fresh.state_dict().items()}
    with pytest.raises(FormatError, match="checksum"):
        load_into(bytes(data), fresh)
    assert all(torch.equal(before[n], t) for n, t in fresh.state_dict().items())


def test_paper_profile_counts_its_fillers() -> None:
    # Gaps 0, 40, 3 with 5 bits: 40 = 32 + 8 needs one filler, as in the paper's figure.
    weight = torch.zeros(1, 46)
    weight[0, [0, 41, 45]] = torch.tensor([1.0, -2.0, 1.0])
    data = check({"w": weight}, profile="huffman")
    with Archive(data) as archive:
        row = archive.info("w")
    assert row["codec"] == "fixed gaps(huffman) codes(huffman)"
    assert row["parts"]["codebook"] == 2 + 4 * 2


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_small_tensors_on_a_grid_are_stored_as_integers(dtype, native, monkeypatch) -> None:
    monkeypatch.setenv("GOSSAMER_NATIVE", native)
    rng = np.random.default_rng(5)
    k = torch.from_numpy(rng.integers(-100, 100, 64))
    k[3] = 0
    grid = (k.double() * float(torch.tensor(0.0137, dtype=torch.float32))).to(dtype)
    noise = torch.from_numpy(rng.normal(size=64)).to(dtype)
    on, off = check({"bias": grid}), check({"bias": noise})
    assert len(on) < len(off) - (32 if dtype.itemsize > 2 else 0)
    assert check({"bias": torch.cat([grid, grid.new_full((1,), -0.0)])})
    for at in range(len(on)):
        bad = bytearray(on)
        bad[at] ^= 0x10
        with pytest.raises(FormatError):
            unpack(bytes(bad))


def test_grids_that_cannot_be_are_refused() -> None:
    from gossamer.pack.coders.limits import Reader
    from gossamer.pack.format.raw import decode_raw
    from gossamer.pack.format.values import BY_CODE

    f32 = BY_CODE[0]
    step = np.array([0.5], "<f4").tobytes()
    good = b"\3" + step + b"\1\2" + bytes([0b11100100])
    assert decode_raw(Reader(good, "x"), f32, 4).view("<f4").tolist() == [-0.5, 0, 0.5, 1]
    for data, why in (
        (b"\3" + np.array([-0.5], "<f4").tobytes() + good[5:], "positive"),
        (b"\3" + np.array([np.nan], "<f4").tobytes() + good[5:], "positive"),
        (good[:6] + b"\x19" + good[7:], "25 bits"),
        (good[:-1], "needs 1 bytes"),
        (good[:4], "grid step"),
        (b"\7" + good[1:], "grid"),
    ):
        with pytest.raises(FormatError, match=why):
            decode_raw(Reader(data, "x"), f32, 4)
