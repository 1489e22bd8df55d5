"""Dynamic sparse training: one step by hand, the family, exactness, and what is refused."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core import names, reallocation
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import EmptyLayerWarning, Masks
from gossamer.prune.dynamic import FAMILY, DynamicSparse, Rule

every_rule = pytest.mark.parametrize("rule", FAMILY.values(), ids=FAMILY.keys())


def oracle(
    weights: dict[str, list[float]],
    momentum: dict[str, list[float]],
    active: dict[str, list[int]],
    rate: float,
) -> dict[str, list[int]]:
    """Algorithm 1 of the paper in plain Python, one weight at a time; steps 3 of the page."""
    means = {n: sum(abs(momentum[n][i]) for i in a) / len(a) for n, a in active.items()}
    importance = {n: m / sum(means.values()) for n, m in means.items()}
    left: dict[str, list[int]] = {}
    removed = 0
    for n, a in active.items():
        p, sparsity = rate, 1 - len(a) / len(weights[n])
        if sparsity < 0.2 and importance[n] > 1 / len(active):
            p = min(sparsity, rate)
        count = math.ceil(p * len(a))
        left[n] = sorted(a, key=lambda i: abs(weights[n][i]))[count:]
        removed += count
    free = {n: len(weights[n]) - len(left[n]) for n in weights}
    wanted = {n: importance[n] * removed for n in weights}
    for _ in range(100):  # overflow goes to the others in equal parts until none is left
        over = {n for n in weights if wanted[n] > int(0.99 * free[n])}
        excess = sum(wanted[n] - int(0.99 * free[n]) for n in over)
        room = [n for n in weights if wanted[n] < int(0.99 * free[n])]
        for n in over:
            wanted[n] = int(0.99 * free[n])
        for n in room:
            wanted[n] += excess / len(room)
    counts = {n: int(w + 1e-9) for n, w in wanted.items()}
    while sum(counts.values()) < removed:  # largest remainder
        n = max(weights, key=lambda n: wanted[n] - counts[n])
        counts[n] += 1
    grown = {}
    for n in weights:
        idle = [i for i in range(len(weights[n])) if i not in left[n]]
        idle.sort(key=lambda i: (-abs(momentum[n][i]), i))
        grown[n] = sorted(left[n] + idle[: counts[n]])
    return grown


def toy(seed: int) -> tuple[nn.Sequential, Masks]:
    """Three layers; the small one is nearly whole and has by far the largest momentum."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(30, 10), nn.Linear(10, 10), nn.Linear(10, 5))
    masks = Masks()
    for name, density in (("0.weight", 0.2), ("1.weight", 0.3), ("2.weight", 0.7)):
        weight = names.parameters(model)[name]
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=g))
        masks[name] = torch.rand(weight.shape, generator=g) < density
    return model, masks


def with_momentum(model: nn.Module, scale: dict[str, float], seed: int) -> torch.optim.SGD:
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for name, p in names.parameters(model).items():
        buffer = torch.randn(p.shape, generator=g) * scale.get(name, 1.0)
        optimizer.state[p]["momentum_buffer"] = buffer
    return optimizer


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_one_step_is_the_papers_with_overflow(seed: int, rate: float) -> None:
    model, masks = toy(seed)
    optimizer = with_momentum(model, {"2.weight": 50.0, "1.weight": 0.1}, seed + 100)
    rule = replace(FAMILY["sparse-momentum"], rate=rate, rate_end=rate, rate_schedule="constant")
    method = DynamicSparse(
        rule, 0.5, steps=10, every=1, generator=torch.Generator(), masks=masks
    ).attach(model, optimizer)
    flat = {n: names.parameters(model)[n].detach().flatten() for n in masks}
    momentum = {
        n: optimizer.state[names.parameters(model)[n]]["momentum_buffer"].flatten() for n in masks
    }
    wanted = oracle(
        {n: w.tolist() for n, w in flat.items()},
        {n: m.tolist() for n, m in momentum.items()},
        {n: m.flatten().nonzero().flatten().tolist() for n, m in masks.items()},
        rate,
    )
    method.reallocate()
    found = {n: m.flatten().nonzero().flatten().tolist() for n, m in method.masks.items()}
    assert found == wanted
    assert method.masks.kept == masks.kept
    # the small layer asked for more than it could take
    free = masks["2.weight"].numel() - len(
        set(found["2.weight"]) & set(masks["2.weight"].flatten().nonzero().flatten().tolist())
    )
    shares = reallocation.importance(
        {n: m.view(masks[n].shape) for n, m in momentum.items()}, masks
    )
    if rate == 0.5:
        assert shares["2.weight"] * method.history[-1]["removed"] > 0.99 * free
    for n, p in ((n, names.parameters(model)[n].detach()) for n in masks):
        assert (p[~method.masks[n]] == 0).all()
        assert (p[method.masks[n] & ~masks[n]] == 0).all()  # grown weights begin at 0


def test_the_nearly_whole_layer_gives_up_no_more_than_its_sparsity() -> None:
    masks = Masks({"a": torch.ones(100) > 0, "b": torch.arange(100) < 50})
    masks["a"][:10] = False
    counts = reallocation.removals(masks, 0.5, {"a": 0.8, "b": 0.2})
    assert counts == {"a": 9, "b": 25}  # ceil(.1 * 90), ceil(.5 * 50)
    assert reallocation.removals(masks, 0.5, {"a": 0.4, "b": 0.6}) == {"a": 45, "b": 25}
    assert reallocation.removals(Masks({"a": torch.arange(40) < 30}), 0.1) == {"a": 3}
    assert reallocation.removals(Masks({"a": torch.arange(40) < 1}), 0.5) == {"a": 0}


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)
        )


def run(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, after: object = None
) -> None:
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(8, 1, 4, 4, generator=g), torch.randint(0, 5, (8,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if callable(after):
            after()


@every_rule
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
def test_counts_and_zeros_are_exact_after_every_step(rule: Rule, adam: bool) -> None:
    model = net()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3
    )
    if adam:
        optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=1e-3)
    method = DynamicSparse(rule, 0.3, steps=40, every=4, generator=torch.Generator().manual_seed(0))
    method.attach(model, optimizer)
    first, target = Masks(method.masks), int(0.3 * (72 + 160) + 0.5)
    parameters = names.parameters(model)

    def check() -> None:
        assert rule.ramp is not None or method.masks.kept == target
        for n, m in method.masks.items():
            assert (parameters[n][~m] == 0).all()

    run(model, optimizer, 40, check)
    assert method.masks.kept == target
    assert set(method.masks) == {"0.weight", "4.weight"}
    moved = any(not torch.equal(m, first[n]) for n, m in method.masks.items())
    assert moved == (rule is not FAMILY["static"])
    rows = method.history
    if rule.growth is not None:
        assert [r["step"] for r in rows] == list(range(4, 4 * len(rows) + 1, 4))
        assert rows[-1]["step"] == (28 if rule is FAMILY["rigl"] else 36)
        assert all(r["removed"] >= r["grown"] or rule.redistribution for r in rows)


def test_gradual_pruning_falls_along_the_cubic() -> None:
    model = nn.Linear(50, 40)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    rule = replace(FAMILY["gradual-magnitude"], until=1.0)
    method = DynamicSparse(rule, 0.1, steps=10, every=2, generator=torch.Generator())
    method.attach(model, optimizer)
    assert method.masks.kept == 2000
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.ones(1, 50)).sum().backward()
        optimizer.step()
    found = [r["density"]["weight"] for r in method.history]
    cubic = [0.1 + 0.9 * (1 - t) ** 3 for t in (0.2, 0.4, 0.6)]
    assert found == pytest.approx([*cubic, 0.1], abs=3e-4)  # the last update completes it


def test_growth_reads_the_dense_gradient_and_ignores_active_weights() -> None:
    model = nn.Linear(4, 1, bias=False)
    masks = Masks({"weight": torch.tensor([[True, True, False, False]])})
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.1, 5.0, 5.0]]))
    rule = Rule("gradient", None, 0.5, 0.5)
    method = DynamicSparse(rule, 0.5, steps=9, every=1, generator=torch.Generator(), masks=masks)
    method.attach(model, optimizer)
    model(torch.tensor([[9.0, 8.0, 1.0, 2.0]])).sum().backward()
    optimizer.step()  # weight 1 goes, weight 3 has the largest gradient of what is then free but 1
    assert method.masks["weight"].tolist() == [[True, True, False, False]]  # 8 > 2: 1 comes back
    model.weight.grad = torch.tensor([[9.0, 0.5, 1.0, 2.0]])
    optimizer.step()
    assert method.masks["weight"].tolist() == [[True, False, False, True]]


def test_functions_of_the_users_own() -> None:
    model, seen = net(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def growth(signals):
        seen.append((set(signals.gradients), set(signals.weights), signals.masks.kept))
        return {n: g * 0 for n, g in signals.gradients.items()}

    rule = Rule(growth, lambda s: {"0.weight": 1.0, "4.weight": 0.0}, 0.25, 0.25, drop=lambda s: {
        n: -w.abs() for n, w in s.weights.items()
    })  # fmt: skip
    method = DynamicSparse(rule, 0.2, steps=4, every=2, generator=torch.Generator().manual_seed(0))
    method.attach(model, optimizer)
    before = method.masks
    run(model, optimizer, 2)
    assert seen == [({"0.weight", "4.weight"}, {"0.weight", "4.weight"}, 46)]
    removed = method.history[0]
    assert int(method.masks["4.weight"].sum()) < int(before["4.weight"].sum())
    assert int(method.masks["0.weight"].sum()) > int(before["0.weight"].sum())
    assert removed["density"] == method.masks.densities()


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.embedding(tokens))
        return self.out(self.attention(x, x, x)[0].mean(1))


def test_recurrent_and_attention_weights_are_sparse_and_embeddings_dense() -> None:
    model = Attentive()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    method = DynamicSparse(
        FAMILY["sparse-momentum"], 0.2, steps=20, every=5, generator=torch.Generator()
    ).attach(model, optimizer)
    assert set(method.masks) == {
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "out.weight",
    }
    kept = method.masks.kept
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        tokens = torch.randint(0, 10, (4, 6), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens), torch.randint(0, 3, (4,), generator=g)).backward()
        optimizer.step()
        assert method.masks.kept == kept
        for n, m in method.masks.items():
            assert (names.parameters(model)[n][~m] == 0).all()
    assert (model.embedding.weight != 0).all()
    assert len(method.history) == 3


def make(rule: Rule = FAMILY["sparse-momentum"], **options: object) -> DynamicSparse:
    given = {"density": 0.3, "steps": 10, "every": 2, "generator": torch.Generator(), **options}
    return DynamicSparse(rule, given.pop("density"), **given)  # type: ignore[arg-type]


def test_what_cannot_be_is_refused_and_nothing_changes() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match="reads the optimizer's momentum"):
        make().attach(copy.deepcopy(model)).reallocate()
    plain = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ArgumentError, match="growth 'momentum' needs an optimizer with momentum"):
        make().attach(model, plain)
    for density in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(ArgumentError, match=r"outside \(0, 1\]"):
            make(FAMILY["set"], density=density).attach(model, plain)
    wrong = Masks({"0.weight": torch.ones(3, 3) > 0})
    with pytest.raises(ArgumentError, match=r"shape \(3, 3\)"):
        make(FAMILY["set"], masks=wrong).attach(model, plain)
    with pytest.raises(ArgumentError, match="matches nothing"):
        make(FAMILY["set"], include="nowhere").attach(model, plain)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    with pytest.raises(ArgumentError, match="must be at least 1"):
        make(every=0)
    full = Masks({"w": torch.ones(4) > 0})
    with pytest.raises(ArgumentError, match="0 inactive weights left"):
        reallocation.grow({"w": torch.ones(4)}, full, {"w": 1})
    for bad in (
        {"growth": "magic"},
        {"redistribution": "magic"},
        {"distribution": "magic"},
        {"drop_scope": "magic"},
        {"rate": 1.5},
        {"ramp": "cubic"},
        {"mask_momentum": True},
        {"rate_schedule": "magic"},
    ):
        with pytest.raises(ArgumentError, match=r"magic|1\.5|cubic|mask_momentum"):
            replace(FAMILY["sparse-momentum"], **bad)  # type: ignore[arg-type]


def test_nan_momentum_leaves_masks_and_weights() -> None:
    model, masks = toy(0)
    optimizer = with_momentum(model, {}, 0)
    method = make(masks=masks).attach(model, optimizer)
    optimizer.state[model[0].weight]["momentum_buffer"].fill_(float("nan"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match=r"momentum of '0\.weight' is not finite"):
        method.reallocate()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(torch.equal(method.masks[n], masks[n]) for n in masks)


def test_a_layer_left_without_weights_is_warned_of() -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with pytest.warns(EmptyLayerWarning, match=r"'1\.weight' keeps none of its 100"):
        make(density=0.004).attach(model, optimizer)


def test_the_classics_are_the_published_combinations() -> None:
    assert {
        # Dettmers and Zettlemoyer 2019: half of each layer at first, by the cosine
        "sparse-momentum": Rule("momentum", "momentum", 0.5, 0.005, "cosine", "uniform"),
        # Mocanu et al. 2018: zeta = 0.3, and no end to it
        "set": Rule("random", None, 0.3, 0.3, "constant", "erdos-renyi"),
        # Evci et al. 2020: alpha = 0.3, until three quarters of the training
        "rigl": Rule(
            "gradient", None, 0.3, 0.0, "cosine", "er-kernel", until=0.75, mask_momentum=True
        ),
        "dsr": Rule("random", "nonzeros", 0.2, 0.0, "cosine", "uniform", drop_scope="global"),
        "gradual-magnitude": Rule(
            None, None, 0.0, 0.0, "cosine", "uniform", ramp="cubic", until=0.75
        ),
        "static": Rule(None, None, 0.0, 0.0, "cosine", "uniform", until=0.0),
    } == FAMILY
    assert Rule(None, None, 0, 0).until == 1.0
    assert not Rule(None, None, 0, 0).mask_momentum


@pytest.mark.parametrize("axis", ["rate", "rate_end", "until"])
def test_fractions_may_be_whole_and_nothing_and_no_more(axis: str) -> None:
    for good in (0, 1):
        replace(FAMILY["set"], **{axis: good})  # type: ignore[arg-type]
    for bad in (-1e-9, 1 + 1e-9, float("nan")):
        with pytest.raises(ArgumentError, match=rf"{axis}=.* is outside \[0, 1\]"):
            replace(FAMILY["set"], **{axis: bad})  # type: ignore[arg-type]


def test_a_ramp_needs_growth_none_and_a_known_schedule() -> None:
    with pytest.raises(ArgumentError, match="ramp='cubic' only removes; it needs growth=None"):
        Rule("random", None, 0.1, 0.1, ramp="cubic")
    with pytest.raises(ArgumentError, match="magic"):
        Rule(None, None, 0.1, 0.1, ramp="magic")
    Rule(None, None, 0.1, 0.1, ramp="cubic")


@pytest.mark.parametrize("axis", ["growth", "redistribution"])
def test_momentum_cannot_be_masked_where_either_axis_reads_it(axis: str) -> None:
    rule = replace(FAMILY["set"], growth="random", redistribution=None)
    with pytest.raises(ArgumentError, match="hides the momentum"):
        replace(rule, mask_momentum=True, **{axis: "momentum"})  # type: ignore[arg-type]
    replace(rule, mask_momentum=True)


@pytest.mark.parametrize(
    ("until", "every", "steps", "wanted"),
    [
        # every 2 of 10: at 2, 4, 6, 8; 10 is the end, after which nothing grown is trained
        (1.0, 2, 10, [2, 4, 6, 8]),
        (0.5, 2, 8, [2, 4]),  # the end itself counts
        (0.74, 3, 12, [3, 6]),
        (1.0, 1, 3, [1, 2]),
        (0.0, 1, 3, []),
    ],
)
def test_updates_fall_where_they_should(
    until: float, every: int, steps: int, wanted: list[int]
) -> None:
    model = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    method = DynamicSparse(
        replace(FAMILY["set"], until=until),
        0.5,
        steps=steps,
        every=every,
        generator=torch.Generator().manual_seed(0),
    ).attach(model, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 6)).sum().backward()
        optimizer.step()
    assert [r["step"] for r in method.history] == wanted
    # 0.3 of 15, up, of which some may grow again
    assert all(0 < r["removed"] == r["grown"] <= 5 for r in method.history)
    assert [r["rate"] for r in method.history] == pytest.approx([0.3] * len(wanted))
    assert method.masks.kept == 15


def test_the_axis_that_reads_momentum_is_named() -> None:
    model = nn.Linear(6, 5)
    rule = replace(FAMILY["set"], redistribution="momentum")
    with pytest.raises(ArgumentError, match=r"^redistribution 'momentum' needs an optimizer with"):
        make(rule).attach(model, torch.optim.SGD(model.parameters(), 0.1))


def test_a_ramp_ends_with_its_last_update_before_until() -> None:
    model = nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    rule = replace(FAMILY["gradual-magnitude"], until=0.8)
    method = DynamicSparse(rule, 0.2, steps=10, every=2, generator=torch.Generator())
    method.attach(model, optimizer)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.ones(1, 10)).sum().backward()
        optimizer.step()
    # until step 8: 0.2 + 0.8 (1 - t)^3 at t = 1/4, 1/2, 3/4, and the target
    assert [(r["step"], round(100 * r["density"]["weight"])) for r in method.history] == [
        (2, 54),
        (4, 30),
        (6, 21),
        (8, 20),
    ]
    assert method.masks.kept == 20


@pytest.mark.parametrize("masked", [True, False])
def test_momentum_of_inactive_weights_is_masked_when_asked(masked: bool) -> None:
    model = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    rule = replace(FAMILY["static"], mask_momentum=masked)
    method = make(rule).attach(model, optimizer)
    model(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    buffer = optimizer.state[model.weight]["momentum_buffer"]
    inactive = ~method.masks["weight"]
    assert bool(buffer[inactive].any()) is not masked
    assert buffer[~inactive].all()


def test_rigl_as_published() -> None:
    """Evci et al. 2020: the rate's cosine ends at T_end, and what grows starts without momentum."""
    torch.manual_seed(0)
    model = nn.Linear(20, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    method = DynamicSparse(FAMILY["rigl"], 0.3, steps=40, every=5, generator=generator)
    method.attach(model, optimizer)
    for _ in range(40):
        before = method.masks["weight"].clone()
        model.zero_grad()
        model(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()
        grown = method.masks["weight"] & ~before
        assert not optimizer.state[model.weight]["momentum_buffer"][grown].any()
    steps = [row["step"] for row in method.history]
    assert steps == [5, 10, 15, 20, 25, 30]
    for row in method.history:
        assert row["rate"] == pytest.approx(0.15 * (1 + math.cos(math.pi * row["step"] / 30)))
    assert any(row["grown"] for row in method.history)


def test_a_state_in_memory_stays_what_it_was() -> None:
    # its history went on growing with the training, and a resumed run had rows twice
    net = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    method = DynamicSparse(
        FAMILY["set"], 0.5, steps=9, every=2, generator=torch.Generator().manual_seed(0)
    ).attach(net, optimizer)
    state = method.state_dict()
    for _ in range(4):
        net(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    assert len(method.history) == 2
    assert state["history"] == []
    assert state["step"] == 0
