"""Data that would be mixed up or read otherwise without a word."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from gossamer import datasets
from gossamer.core.errors import ArgumentError, DatasetError, GossamerError
from gossamer.datasets import Split, as_dataset, as_split

X, Y = torch.arange(120.0).view(60, 2), torch.arange(60) % 3
EXAMPLES: Dataset[Any] = TensorDataset(X, Y)


def seen(split: Split) -> set[float]:
    return set(split.batch(slice(0, len(split)))[0][:, 0].tolist())


def test_a_loader_of_some_examples_gives_those(tmp_path: Path) -> None:
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    train = DataLoader(EXAMPLES, 8, sampler=SubsetRandomSampler(order[:40]))
    held = DataLoader(
        EXAMPLES, batch_sampler=BatchSampler(SubsetRandomSampler(order[40:]), 8, True)
    )
    made = as_dataset({"train": train, "validation": held, "test": held})
    assert len(made.train) == 40
    assert len(made.validation) == 20
    assert not seen(made.train) & seen(made.validation)
    for whole in (DataLoader(EXAMPLES, 8), DataLoader(EXAMPLES, 8, shuffle=True)):
        assert len(as_split(whole)[0]) == 60


@pytest.mark.parametrize(
    "sampler",
    [
        WeightedRandomSampler(torch.ones(60).tolist(), 20),
        RandomSampler(EXAMPLES, replacement=True),  # type: ignore[arg-type]
        RandomSampler(EXAMPLES, num_samples=30),  # type: ignore[arg-type]
    ],
)
def test_a_loader_that_draws_examples_twice_is_refused(sampler: Any) -> None:
    with pytest.raises(DatasetError, match=f"draws by a {type(sampler).__name__}.*Subset"):
        as_split(DataLoader(EXAMPLES, 8, sampler=sampler))


class Batches(Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        part = slice(index * 12, index * 12 + 12)
        return X[part], Y[part]


def test_a_loader_whose_items_are_batches() -> None:
    split = as_split(DataLoader(Batches(), batch_size=None))[0]
    assert len(split) == 60
    assert torch.equal(split.inputs, X)


def test_parts_by_name_may_be_tensors() -> None:
    made = as_dataset({"train": X, "test": X[:5]})
    assert len(made.train) == 54
    assert torch.equal(made.test.inputs, X[:5])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": (X, Y), "val": (X, Y), "dev": (X, Y)}, "'val', 'dev', two of which are one"),
        ((X, Y[:50]), "60 inputs but 50 targets"),
        ((X, torch.cat([Y, Y])), "60 inputs but 120 targets"),
        ((X, ["a"] * 60), "targets is of type list"),
        ([(x, y) for x, y in zip(X, Y, strict=True)], "batch 1: targets hold a scalar"),
        ([(x, x[:1]) for x in X], "batch 1 is .*another number of targets"),
    ],
)
def test_what_does_not_fit_together_is_told(data: Any, words: str) -> None:
    with pytest.raises(GossamerError, match=words):
        as_dataset(data)


def test_a_dataset_again_with_classes() -> None:
    made = as_dataset((X, Y))
    assert as_dataset(made) is made
    assert as_dataset(made, classes=7).classes == 7


def test_float_images_are_not_divided_by_255_again() -> None:
    split = Split(torch.rand(4, 3, 2, 2), torch.arange(4), mean=(0.5,) * 3, std=(0.2,) * 3)
    with pytest.raises(DatasetError, match=r"mean and std are of uint8 images.*torch\.float32"):
        datasets.check_split(split)


@pytest.mark.parametrize("query", ["seed=3", "source=a", "bptt=3&bptt=4"])
def test_options_of_a_name_that_are_given_elsewhere_or_twice(query: str) -> None:
    with pytest.raises(ArgumentError, match=f"{query[:4]}.* is no option of its name, or given"):
        datasets.load(f"text:tiny-shakespeare?{query}")


def test_a_text_cut_short_is_not_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tiny-shakespeare.txt").write_text("First Citizen:\n" * 999)
    with pytest.raises(DatasetError, match=r"has md5 .*, that of tiny-shakespeare is 6fb458f1"):
        datasets.load("text:tiny-shakespeare", root=tmp_path)
