"""Every builder against loops over the weights."""

import itertools
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from gossamer import nets
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.groups import Family, families
from gossamer.core.layer_groups import KINDS, layer_groups
from gossamer.core.unit_groups import attention_heads, feed_forward_units


def places(family: Family, number: int, name: str) -> set[int]:
    one = torch.zeros(len(family))
    one[number] = 1
    return set(family.spread(one, name).reshape(-1).nonzero()[:, 0].tolist())


def holds(family: Family, model: nn.Module, name: str, wanted: Iterable[Tensor]) -> None:
    """Group i holds exactly the entries wanted[i] of a parameter."""
    wanted = list(wanted)
    assert len(wanted) == len(family)
    for number, entries in enumerate(wanted):
        assert places(family, number, name) == set(entries.reshape(-1).tolist())
    family.check(names.parameters(model))
    again = families(family, names.parameters(model))  # as data, and back
    sums = family.sums(dict(names.parameters(model)))
    assert torch.allclose(torch.cat([f.sums(dict(names.parameters(model))) for f in again]), sums)


def numbered(model: nn.Module, name: str) -> Tensor:
    weight = names.parameters(model)[name]
    return torch.arange(weight.numel()).view(weight.shape)


def conv(groups: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, (2, 3), groups=groups))


def only(model: nn.Module, kind: str) -> Family:
    (family,) = layer_groups(model, kind)
    return family


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_of_a_convolution(groups: int) -> None:
    net = conv(groups)
    w = numbered(net, "0.weight")
    outs, ins = 6 // groups, 4 // groups
    part = [slice(g * outs, (g + 1) * outs) for g in range(groups)]
    holds(only(net, "filter"), net, "0.weight", w)
    holds(only(net, "filter"), net, "0.bias", torch.arange(6))
    each = [w[part[g], c] for g in range(groups) for c in range(ins)]
    holds(only(net, "channel"), net, "0.weight", each)
    fibres = [
        w[part[g], c, m, k]
        for g, c, m, k in itertools.product(range(groups), range(ins), range(2), range(3))
    ]
    holds(only(net, "shape"), net, "0.weight", fibres)
    holds(only(net, "2d-filter"), net, "0.weight", [w[n, c] for n in range(6) for c in range(ins)])
    holds(only(net, "depth"), net, "0.weight", [w])
    holds(only(net, "depth"), net, "0.bias", [torch.arange(6)])


def test_blocks_run_along_input_channels_and_the_last_may_be_short() -> None:
    net = nn.Sequential(nn.Conv2d(6, 2, 2))
    w = numbered(net, "0.weight")
    blocks = [
        w[n, c : c + 4, m, k]
        for n, m, k, c in itertools.product(range(2), range(2), range(2), (0, 4))
    ]
    holds(only(net, "block-1x4"), net, "0.weight", blocks)
    linear = nn.Sequential(nn.Linear(8, 3))
    v = numbered(linear, "0.weight")
    family = only(linear, "2:4")
    holds(family, linear, "0.weight", [v[n, c : c + 4] for n in range(3) for c in (0, 4)])
    assert family.sparse == (2, 4)
    assert family.name(5) == "0 2:4[2, 0, 1]"


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_of_a_transposed_convolution(groups: int) -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=groups))
    w = numbered(net, "0.weight")
    ins, outs = 4 // groups, 6 // groups
    filters = [w[g * ins : (g + 1) * ins, n] for g in range(groups) for n in range(outs)]
    holds(only(net, "filter"), net, "0.weight", filters)
    holds(only(net, "channel"), net, "0.weight", w)
    with pytest.raises(ArgumentError, match=r"0\.weight has no groups 'shape': it is a transposed"):
        layer_groups(net, "shape", include="0")


def test_rows_and_columns() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Conv1d(1, 1, 1))
    (rows,) = layer_groups(net, "row")  # the convolution has none, and was not named
    holds(rows, net, "0.weight", numbered(net, "0.weight"))
    holds(rows, net, "0.bias", torch.arange(2))
    holds(layer_groups(net, "column")[0], net, "0.weight", numbered(net, "0.weight").T)
    assert str(rows[1]) == "0 row[1]: 0.weight[1], 0.bias[1]"


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_units_of_two_bidirectional_layers_and_what_reads_them(
    kind: type[nn.LSTM | nn.GRU], gates: int
) -> None:
    net = nn.ModuleDict({"rnn": kind(2, 3, 2, bidirectional=True), "out": nn.Linear(6, 5)})
    made = layer_groups(net, "unit", consumers={"rnn": "out"})
    names_of = [f"rnn_l{i}{way}" for i in range(2) for way in ("", "_reverse")]
    assert [f.layer for f in made] == names_of
    for side, family in enumerate(made):
        own = family.layer.removeprefix("rnn")
        for leaf in ("weight_ih", "bias_ih", "bias_hh"):
            w = numbered(net, f"rnn.{leaf}{own}")
            rows = [w[[g * 3 + k for g in range(gates)]] for k in range(3)]
            holds(family, net, f"rnn.{leaf}{own}", rows)
        w = numbered(net, f"rnn.weight_hh{own}")
        both = [
            torch.cat([w[[g * 3 + k for g in range(gates)]].flatten(), w[:, k]]) for k in range(3)
        ]
        holds(family, net, f"rnn.weight_hh{own}", both)
        first = 3 * (side % 2)
        after = ["rnn.weight_ih_l1", "rnn.weight_ih_l1_reverse"] if side < 2 else ["out.weight"]
        for name in after:
            holds(family, net, name, numbered(net, name)[:, first : first + 3].T)


def test_the_units_of_a_language_model_are_the_papers() -> None:
    net = nets.build("lstm-lm", classes=7, embedding=4, hidden=(3, 2))
    made = layer_groups(net, "unit", consumers={"rnn.0": "rnn.1", "rnn.1": ["output"]})
    first = made[0].weights_only()
    # 4 gate rows of both weights, the recurrent column less its corner, the next layer's column
    assert first.sizes().tolist() == [4 * 4 + 4 * 3 + (12 - 4) + 8] * 3
    assert made[1].weights_only().sizes().tolist() == [4 * 3 + 4 * 2 + (8 - 4) + 7] * 2


def test_cells_are_layers() -> None:
    net = nn.ModuleDict({"cell": nn.LSTMCell(2, 3), "out": nn.Linear(3, 1)})
    (family,) = layer_groups(net, "unit", consumers={"cell": "out"})
    assert family.weights_only().sizes().tolist() == [4 * 2 + 4 * 3 + 8 + 1] * 3


def test_heads_of_torchs_attention() -> None:
    net = nn.ModuleDict({"a": nn.MultiheadAttention(6, 3)})
    family = only(net, "head")
    w = numbered(net, "a.in_proj_weight")
    rows = [w[[p * 6 + h * 2 + i for p in range(3) for i in range(2)]] for h in range(3)]
    holds(family, net, "a.in_proj_weight", rows)
    out = numbered(net, "a.out_proj.weight")
    holds(family, net, "a.out_proj.weight", [out[:, 2 * h : 2 * h + 2] for h in range(3)])
    own = nn.ModuleDict({"a": nn.MultiheadAttention(6, 3, kdim=5, vdim=4, add_bias_kv=True)})
    wide = only(own, "head")
    w = numbered(own, "a.k_proj_weight")
    holds(wide, own, "a.k_proj_weight", [w[2 * h : 2 * h + 2] for h in range(3)])
    holds(wide, own, "a.bias_v", torch.arange(6).view(3, 2))


def test_heads_of_grouped_queries_and_of_a_packed_layer() -> None:
    net = nn.ModuleDict(
        {"q": nn.Linear(5, 8), "k": nn.Linear(5, 4), "v": nn.Linear(5, 4), "o": nn.Linear(8, 5)}
    )
    family = attention_heads(net, query="q", key="k", value="v", output="o", heads=4, key_heads=2)
    q, k, o = (numbered(net, f"{n}.weight") for n in "qko")
    holds(family, net, "q.weight", [q[:4], q[4:]])
    holds(family, net, "v.weight", [k[:2], k[2:]])
    holds(family, net, "o.weight", [o[:, :4], o[:, 4:]])
    packed = nn.ModuleDict({"p": nn.Linear(4, 12), "o": nn.Linear(4, 4)})
    whole = attention_heads(packed, query="p", key="p", value="p", output="o", heads=2)
    p = numbered(packed, "p.weight")
    rows = [p[[t * 4 + h * 2 + i for t in range(3) for i in range(2)]] for h in range(2)]
    holds(whole, packed, "p.weight", rows)
    with pytest.raises(ArgumentError, match="heads=3 must divide 4"):
        attention_heads(packed, query="p", key="p", value="p", output="o", heads=3)
    with pytest.raises(ArgumentError, match="'k' has 4 outputs, not 8"):
        attention_heads(net, query="k", key="k", value="v", output="o", heads=4)


def test_feed_forward_units_gated_and_plain() -> None:
    net = nn.TransformerEncoderLayer(4, 2, dim_feedforward=3)
    family = only(net, "feed-forward")
    holds(family, net, "linear1.weight", numbered(net, "linear1.weight"))
    holds(family, net, "linear2.weight", numbered(net, "linear2.weight").T)
    gated = nn.ModuleDict({"g": nn.Linear(2, 3), "u": nn.Linear(2, 3), "d": nn.Linear(3, 2)})
    units = feed_forward_units(gated, up=["g", "u"], down="d")
    holds(units, gated, "u.weight", numbered(gated, "u.weight"))
    with pytest.raises(ArgumentError, match="'g' reads 2 inputs, not 3"):
        feed_forward_units(gated, up="u", down="g")


def test_every_kind_is_there_or_names_what_it_lacks() -> None:
    net = nets.build("lenet-5")
    for kind in KINDS:
        try:
            assert all(len(f) for f in layer_groups(net, kind))
        except ArgumentError as e:
            assert f"no layer has groups {kind!r}" in str(e)  # noqa: PT017


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "filters"}, "groups 'filters' is not one of filter.*did you mean 'filter'"),
        ({"kind": "4:2"}, "is not one of"),
        ({"kind": "block-1x0"}, "is not one of"),
        ({"kind": "filter", "include": "ip1"}, r"ip1\.weight has no groups 'filter': it is of Lin"),
        ({"kind": "row", "include": "conv1"}, "has 4 dimensions"),
        ({"kind": "3:7", "include": "ip1"}, "has 800 inputs to an output, no multiple of 7"),
        ({"kind": "unit", "include": "ip1"}, r"ip1\.weight has no groups 'unit'"),
        ({"kind": "head"}, "no layer has groups 'head'"),
        ({"kind": "row", "include": "nothing"}, "matches nothing"),
        ({"kind": "row", "consumers": {"ip1": "ip2"}}, "consumers are of groups 'unit'"),
    ],
)
def test_what_cannot_be_is_named(options: dict[str, object], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        layer_groups(nets.build("lenet-5"), **options)  # type: ignore[arg-type]


def test_consumers_that_do_not_fit_are_named() -> None:
    net = nn.ModuleDict({"rnn": nn.LSTM(2, 3), "out": nn.Linear(4, 5)})
    with pytest.raises(ArgumentError, match="'out' has no matrix of 3 columns"):
        layer_groups(net, "unit", consumers={"rnn": "out"})
    with pytest.raises(ArgumentError, match="consumers names 'out'"):
        layer_groups(net, "unit", consumers={"out": "rnn"})
    with pytest.raises(ArgumentError, match="proj_size=2"):
        layer_groups(nn.ModuleDict({"rnn": nn.LSTM(2, 3, proj_size=2)}), "unit")
