"""What a convolution's kernel lies on: rows as torch unfolds them, and sums of their products."""

import pytest
import torch
import torch.nn.functional as F

from gossamer.training import patches
from gossamer.training.patches import Patches

SHAPES = [  # sizes, kernel, stride, dilation, before, after, groups
    ((9, 7), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1),
    ((9, 7), (3, 3), (1, 2), (1, 1), (1, 1), (1, 1), 2),
    ((12, 6), (3, 2), (1, 1), (2, 1), (2, 0), (2, 1), 1),
    ((16, 5), (5, 1), (1, 1), (1, 1), (0, 0), (0, 0), 4),
    ((9, 9), (2, 3), (1, 1), (1, 2), (0, 1), (1, 3), 2),
    ((9, 9), (3, 3), (2, 1), (1, 1), (1, 1), (1, 1), 1),  # a stride along the height
    ((3, 3), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1),  # windows that share no row
    ((9, 9), (1, 1), (1, 1), (1, 1), (0, 0), (0, 0), 1),
    ((9, 9), (3, 3), (1, 1), (1, 1), (-1, 0), (-2, 1), 1),  # cropped
    ((20,), (5,), (2,), (1,), (2,), (2,), 2),
    ((5, 4, 6), (2, 3, 2), (1, 1, 2), (1, 1, 1), (1, 0, 0), (0, 1, 1), 1),
]


def both(shape: tuple) -> tuple[Patches, Patches]:
    sizes, kernel, stride, dilation, before, after, groups = shape
    g = torch.Generator().manual_seed(len(sizes))
    one, two = (torch.randn(3, 4, *sizes, generator=g) for _ in range(2))
    rest = (kernel, stride, dilation, before, after, groups)
    return Patches(one, *rest), Patches(two, *rest)


@pytest.mark.parametrize("shape", SHAPES)
def test_products_and_sums_are_those_of_the_rows(shape: tuple) -> None:
    one, two = both(shape)
    x, y = (torch.stack(p.rows()) for p in (two, one))
    assert y.shape == (one.groups, one.count, one.columns)
    near = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(one.gram(one), y.mT @ y, **near)
    torch.testing.assert_close(one.gram(two), x.mT @ y, **near)
    torch.testing.assert_close(one.sums(), y.double().sum(1), **near)
    at = torch.tensor([4, 0, one.count - 1])
    assert torch.equal(torch.stack(one.some(at)), y[:, at])


@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_some_columns_and_of_some_images_at_a_time(
    shape: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = both(shape)
    whole = one.gram(two)
    monkeypatch.setattr(patches, "_AT_ONCE", 1)
    near = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(one.gram(two), whole, **near)
    half = one.columns // 2
    for part in (slice(0, half), slice(half, one.columns), slice(0, one.columns)):
        torch.testing.assert_close(one.gram(two, part), whole[:, part, part], **near)
        mine = one.gram(one)[:, part, part]
        torch.testing.assert_close(one.gram(one, part), mine, **near)


def test_rows_are_those_of_unfold() -> None:
    one, _ = both(SHAPES[0])
    expected = F.unfold(one.x, 3, padding=1).mT.reshape(-1, one.columns)
    assert torch.equal(one.rows()[0], expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sums_say_what_is_not_finite(value: float) -> None:
    one, _ = both(SHAPES[0])
    one.x[1, 2, 3, 4] = value
    assert not one.sums().isfinite().all()


def test_a_copy_keeps_its_values() -> None:
    one, _ = both(SHAPES[1])
    kept, before = one.copied(), torch.stack(one.rows())
    one.x.zero_()
    assert torch.equal(torch.stack(kept.rows()), before)
