"""Optimal Brain Surgeon: the solver against exact inverses, one weight at a time."""

import itertools

import pytest
import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.core.obs import Choice, Kept, _carry, _carry_numpy, factor, solve, start_from
from gossamer.quantize.obs import Coded, Prices, Pruned, Rounded, scale_of, step_for


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64)
    x = torch.randn(4 * columns, columns, generator=g, dtype=torch.float64) @ mix
    return torch.randn(rows, columns, generator=g, dtype=torch.float64), x.T @ x / len(x)


def surgeon(row: Tensor, hessian: Tensor, values: list[float | None], order: list[int]) -> Tensor:
    """Set one weight after the other, with the exact inverse of what is left each time.

    values: what each becomes; None: kept as it is when its turn comes.
    """
    w, left = row.clone(), list(range(len(row)))
    for j in order:
        inverse = torch.linalg.inv(hessian[left][:, left])
        at = left.index(j)
        wanted = w[j] if values[j] is None else torch.tensor(values[j], dtype=w.dtype)
        w[left] -= (w[j] - wanted) / inverse[at, at] * inverse[:, at]
        w[j] = wanted
        left.remove(j)
    return w


class Given(Choice):
    """Values written down beforehand."""

    def __init__(self, values: list[float | None]) -> None:
        self.values = values

    def column(self, number: int, weight: Tensor, diagonal: Tensor) -> Tensor:
        value = self.values[number]
        return weight[:, 0].clone() if value is None else torch.full_like(weight[:, 0], value)


def cost(row: Tensor, found: Tensor, hessian: Tensor) -> float:
    return float((row - found) @ hessian @ (row - found)) / 2


@pytest.mark.parametrize("block", [1, 2, 128])
@pytest.mark.parametrize("columns", [1, 2, 5, 12])
def test_equals_the_exact_inverse_after_each_removal(columns: int, block: int) -> None:
    w, h = problem(1, columns, columns)
    values: list[float | None] = [None if j % 3 == 1 else 0.0 for j in range(columns)]
    found = solve(w, factor(h, 0), Given(values), block=block)
    exact = surgeon(w[0], h, values, list(range(columns)))
    torch.testing.assert_close(found.weight[0], exact, rtol=0, atol=1e-8)
    assert float(found.cost[0]) == pytest.approx(cost(w[0], found.weight[0], h), abs=1e-8)


def test_equals_it_in_every_order() -> None:
    w, h = problem(1, 4, 3)
    values = [0.0, None, 0.25, 0.0]
    for order in itertools.permutations(range(4)):
        places = torch.tensor(order)
        upper = factor(h[places][:, places], 0)
        choice = Given([values[j] for j in order])
        found = solve(w, upper, choice, order=places)
        exact = surgeon(w[0], h, values, list(order))
        torch.testing.assert_close(found.weight[0], exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize("then", [None, 3])
def test_pruning_and_rounding_equal_it_too(then: int | None) -> None:
    w, h = problem(3, 12, 5)
    inner = Kept() if then is None else Rounded(then)
    found = solve(w, factor(h, 0), Pruned(0.5, then=inner)).weight
    assert int((found == 0).sum()) >= 18
    step = scale_of(w, then, factor(h, 0).diagonal().square().reciprocal()) if then else None
    for r in range(3):
        values: list[float | None] = [None if v else 0.0 for v in found[r].tolist()]
        if step is not None:
            values = found[r].tolist()
            codes = found[r] / step[r]
            torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-9)
        exact = surgeon(w[r], h, values, list(range(12)))
        torch.testing.assert_close(found[r], exact, rtol=0, atol=1e-8)


def test_what_is_removed_first_is_what_costs_least() -> None:
    # with independent inputs OBS is magnitude times the input's power
    w = torch.tensor([[1.0, 2.0, 3.0, 0.5]], dtype=torch.float64)
    h = torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    found = solve(w, factor(h, 0), Pruned(0.5)).weight
    assert found.tolist() == [[1.0, 0.0, 3.0, 0.0]]  # 9, 4, 9, .25


@pytest.mark.parametrize("sparsity", ["2:4", "4:8", "1x4", "unstructured"])
def test_sparsity_types_are_exact(sparsity: str) -> None:
    w, h = problem(6, 16, 7)
    upper = factor(h)
    found = solve(w, upper, Pruned(0.5, sparsity), block=8).weight  # type: ignore[arg-type]
    zero = found == 0
    assert int(zero.sum()) == 48
    if ":" in sparsity:
        m = int(sparsity[-1])
        assert (zero.view(6, 16 // m, m).sum(2) == m // 2).all()
    if sparsity == "1x4":
        groups = zero.view(6, 4, 4)
        assert (groups.all(2) | ~groups.any(2)).all()
    plain = w.masked_fill(w.abs() <= w.abs().flatten().kthvalue(48).values, 0)
    mine, theirs = ((w - q) @ h * (w - q) for q in (found, plain))
    if sparsity == "unstructured":
        assert float(mine.sum()) < float(theirs.sum())
    with pytest.raises(ArgumentError, match="keeps half"):
        Pruned(0.4, "2:4")


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [None, 4])
def test_rounding_is_on_its_grid_and_better_than_to_nearest(bits: int, group: int | None) -> None:
    w, h = problem(8, 20, bits)
    upper = factor(h)
    found = solve(w, upper, Rounded(bits, group), block=8).weight
    top = (1 << (bits - 1)) - 1
    for r in range(8):
        for part in found[r].split(group or 20):
            assert len(part[part != 0].abs().unique()) <= top
    step = scale_of(w, bits)[:, None]
    nearest = (w / step).round().clamp(-top, top) * step
    mine, theirs = (float(((w - q) @ h * (w - q)).sum()) for q in (found, nearest))
    if group is None:
        assert mine < theirs


def test_without_a_rate_the_codes_are_the_nearest() -> None:
    w, h = problem(4, 12, 1)
    upper = factor(h)
    found = solve(w, upper, Coded(0.3, 0.0, Prices.even(4, 12, 100))).weight

    class Nearest(Choice):
        def column(self, number: int, weight: Tensor, diagonal: Tensor) -> Tensor:
            return (weight[:, 0] / 0.3).round() * 0.3 + 0.0

    assert torch.equal(found, solve(w, upper, Nearest()).weight)


def test_a_rate_buys_bits_at_no_more_than_its_price() -> None:
    w, h = problem(64, 48, 2)
    upper = factor(h)
    before, spent, errors = None, [], []
    for rate in (0.0, 0.05, 0.5, 5.0):
        step = 0.2
        prices = Prices.fitted((w / step).round(), 100)
        for _ in range(2):
            solved = solve(w, upper, Coded(step, rate, prices))
            codes = (solved.weight / step).round()
            prices = Prices.fitted(codes, 100)
        spent.append(float(prices.of(codes).sum()))
        errors.append(float(solved.cost.sum()))
        before = before or spent[0]
    assert spent == sorted(spent, reverse=True)
    assert errors == sorted(errors)
    assert spent[-1] < 0.8 * before


def test_the_rate_is_what_the_file_takes() -> None:
    from gossamer.pack import pack_bytes

    w, h = problem(64, 400, 4)
    step = 0.25
    even = Prices.even(64, 400, 200)
    codes = (solve(w, factor(h), Coded(step, 0.05, even)).weight / step).round()
    total = float(Prices.fitted(codes, 200).of(codes).sum()) / 8
    values = (codes.float() * torch.tensor(step)).contiguous()
    parts = len(pack_bytes({"w": values}, profile="fast"))
    assert 0.98 * total < parts < 1.02 * total + 200  # header and tables


def test_prices_are_ideal_lengths_where_the_codes_stand() -> None:
    codes = torch.zeros(1000, 2000)
    codes[::2, ::4] = 3  # half of the rows, a quarter of the columns, in all an eighth
    codes[0, 0] = -5
    prices = Prices.fitted(codes, 9)
    zero = prices.zero.neg().exp2()
    torch.testing.assert_close(zero + prices.other.neg().exp2(), torch.ones_like(zero))
    assert float(zero[0, 1]) == pytest.approx(0.994, abs=0.002)  # odds 3 * 400 / 7
    assert float(zero[1, 1]) > 0.99
    assert float(zero[0, 0]) == pytest.approx(0.31, abs=0.01)  # odds 3 * 1 / 7: both are dense
    assert float(prices.size[3]) == pytest.approx(1.0, abs=0.01)  # a sign
    assert prices.size[5:].diff().gt(0).all()  # what is not there costs the more the larger it is
    assert float(prices.of(codes)[0, 0]) == float(prices.other[0, 0] + prices.size[5])
    half = (prices * 0.5)[:3]
    torch.testing.assert_close(half.of(codes[:3]), prices.of(codes)[:3] / 2)
    assert Prices.even(2, 3, 4).of(torch.ones(2, 3)).count_nonzero() == 0
    assert torch.isfinite(Prices.fitted(torch.zeros(2, 2), 5).size).all()
    assert torch.isfinite(Prices.fitted(torch.full((2, 2), 9.0), 5).size).all()  # beyond the most


def test_the_step_of_a_rate_balances_error_and_bits() -> None:
    w, h = problem(256, 32, 6)
    upper, rate = factor(h), 1e-3
    step = step_for(upper.diagonal(), rate)

    def total(s: float) -> float:
        solved = solve(w, upper, Coded(s, 0.0, Prices.even(256, 32, 10000)))
        codes = (solved.weight / s).round()
        bits = Prices.fitted(codes, 10000).of(codes).sum()
        return 2 * float(solved.cost.sum()) + rate * float(bits)

    assert total(step) < min(total(step / 1.7), total(step * 1.7))


def test_inputs_of_the_compressed_network_move_the_start() -> None:
    w, h = problem(5, 6, 8)
    assert torch.allclose(start_from(w, h, h), w, atol=1e-9)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=g, dtype=torch.float64)
    y = x + 0.5 * torch.randn(200, 6, generator=g, dtype=torch.float64)
    found = start_from(w, y.T @ y, x.T @ y, damp=0.0)
    exact = torch.linalg.lstsq(y, x @ w.T).solution.T
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-8)


def test_dead_inputs_singular_and_bad_hessians() -> None:
    w, h = problem(3, 5, 9)
    h[2], h[:, 2] = 0, 0
    found = solve(w, factor(h), Pruned(0.6)).weight
    assert torch.isfinite(found).all()
    assert int((found == 0).sum()) == 6
    kept = solve(w, factor(h), Kept()).weight
    assert torch.equal(kept, w)  # nothing is carried to or from a dead input
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    singular = x.T @ x
    assert torch.isfinite(factor(singular)).all()
    assert torch.isfinite(factor(singular, 0.0)).all()  # damped until it can be done
    with pytest.raises(ArgumentError, match="square"):
        factor(torch.ones(2, 3))
    with pytest.raises(ArgumentError, match="NaN"):
        factor(torch.full((2, 2), float("nan")))
    with pytest.raises(ArgumentError, match="not positive"):
        factor(torch.tensor([[-1.0, 0.0], [0.0, -1.0]]))
    with pytest.raises(ArgumentError, match="takes 4 inputs at once"):
        solve(w, factor(h), Pruned(0.5, "1x4"))
    assert factor(torch.zeros(3, 3)).diagonal().tolist() == [1.0, 1.0, 1.0]


def test_in_main_memory_it_is_the_same_as_in_torch() -> None:
    g = torch.Generator().manual_seed(9)
    w, h = problem(20, 48, 9)
    upper = factor(h)
    prices = Prices.fitted((w / 0.2).round(), 30)
    of_rows = torch.rand(20, generator=g, dtype=torch.float64)
    for factors in (None, of_rows):
        choice = Coded(0.2, 0.3, prices, factors)
        for j in range(48):
            column, diagonal = w[:, j:] * 2, upper.diagonal()[j:]
            expected = choice._torch(j, column[:, 0], diagonal[0])
            assert torch.equal(choice.column(j, column, diagonal), expected)
    found = []
    for carry in (_carry, _carry_numpy):
        part, errors, taken = w.clone(), torch.empty_like(w), torch.empty_like(w)
        carry(part, upper, errors, taken, lambda j, part=part: (part[:, j] / 0.3).round() * 0.3)
        found.append((errors, taken))
    torch.testing.assert_close(found[0], found[1])
