"""Codes and code books: counts by hand, and what is no code book."""

import pytest
import torch

from gossamer.core.codebook import Quantized
from gossamer.core.errors import ArgumentError


def test_an_exact_code_book_by_hand() -> None:
    found = Quantized.of(torch.tensor([[3.0, -0.0, -1.5], [0.0, 3.0, 2.0]]))
    assert found.codebook.tolist() == [0.0, -1.5, 2.0, 3.0]
    assert found.codes.tolist() == [[3, 0, 1], [0, 3, 2]]
    assert torch.equal(found.dequantize(), torch.tensor([[3.0, 0.0, -1.5], [0.0, 3.0, 2.0]]))


@pytest.mark.parametrize(("entries", "bits"), [(1, 1), (2, 1), (3, 2), (16, 4), (17, 5)])
def test_bits_of_a_fixed_width_code(entries: int, bits: int) -> None:
    codes = torch.zeros(3, dtype=torch.uint8)
    assert Quantized(codes, torch.arange(float(entries))).bits == bits


@pytest.mark.parametrize(
    ("codes", "book", "told"),
    [
        (torch.tensor([-1]), torch.tensor([0.0, 1.0]), r"span \[-1, -1\]"),
        (torch.tensor([2]), torch.tensor([0.0, 1.0]), r"span \[2, 2\]"),
        (torch.tensor([True]), torch.tensor([0.0, 1.0]), "must be integers"),
        (torch.tensor([1.0]), torch.tensor([0.0, 1.0]), "must be integers"),
        (torch.tensor([1]), torch.tensor([1.0, 2.0]), "must be exactly 0"),
        (torch.tensor([0]), torch.zeros(0), "must be exactly 0"),
        (torch.tensor([0]), torch.tensor([0, 1]), "1-D floating point"),
        (torch.tensor([0]), torch.zeros(1, 2), "1-D floating point"),
        (torch.tensor([0]), torch.tensor([0.0, float("nan")]), "NaN"),
    ],
)
def test_what_is_no_code_book(codes: torch.Tensor, book: torch.Tensor, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        Quantized(codes, book)


def test_the_edges_are_allowed() -> None:
    assert Quantized(torch.tensor([0, 1]), torch.tensor([0.0, 1.0])).codes.tolist() == [0, 1]
    assert Quantized(torch.zeros(0, dtype=torch.int64), torch.zeros(1)).dequantize().numel() == 0
