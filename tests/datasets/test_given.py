"""Data as people have it become splits: what is there is used, what is missing is said."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import gossamer
from gossamer.core.errors import DatasetError
from gossamer.datasets import Collated, Dataset, Split, as_dataset, as_split, batches, contents
from gossamer.datasets.given import separate

X, Y = torch.arange(60.0).reshape(30, 2), torch.arange(30) % 3


class Rows:
    """A map-style dataset of mappings, as Hugging Face's are; counts what is fetched."""

    def __init__(self, labels=True):
        self.labels, self.fetched = labels, 0

    def __len__(self):
        return 30

    def __getitem__(self, i):
        self.fetched += 1
        return {"x": X[i], **({"label": int(Y[i])} if self.labels else {})}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def same(split, inputs, targets):
    found, labels = split.batch(slice(None))
    found = found["x"] if isinstance(found, dict) else found
    assert torch.equal(found, inputs)
    assert labels is None if targets is None else torch.equal(labels, targets)


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (Split(X, Y), True),
        (X, False),
        ((X, Y), True),
        ({"x": X, "labels": Y}, True),
        ({"x": X}, False),
        ([X[:20], X[20:]], False),
        ([(X[:20], Y[:20]), (X[20:], Y[20:])], True),
        ([{"x": X, "target": Y}], True),
        (((X[i : i + 7], Y[i : i + 7]) for i in range(0, 30, 7)), True),
        (TensorDataset(X, Y), True),
        (TensorDataset(X), False),
        (DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True), True),
        (DataLoader(Stream(), batch_size=8), True),
        (Rows(), True),
        (Rows(labels=False), False),
    ],
)
def test_every_kind_gives_the_same_examples(data, labels):
    split, _ = as_split(data)
    assert len(split) == 30
    same(split, X, Y if labels else None)


def test_a_loaders_examples_are_fetched_when_they_are_asked_for():
    rows = Rows()
    split, told = as_split(rows)
    assert told == []
    assert isinstance(split, Collated)
    rows.fetched = 0
    part = split.take(torch.tensor([4, 2]))
    assert rows.fetched <= 1  # one to know what they are like
    found, labels = part.batch(slice(None))
    assert torch.equal(found["x"], X[[4, 2]])
    assert labels.tolist() == [1, 2]
    assert [len(y) for _, y in batches(split, 8, generator=None)] == [8, 8, 8, 6]
    assert contents.of_split(split) == contents.of_split(as_split(Rows())[0])
    assert contents.of_split(split) != contents.of_split(part)


def test_what_is_missing_is_carved_and_said():
    data = as_dataset(X, name="mine", classes=3)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [24, 3, 3]
    assert "3 of 30 examples were held back at random for test" in data.notes[1]
    rows = torch.cat([s.stored for s in (data.train, data.validation, data.test)])
    assert torch.equal(rows[rows[:, 0].argsort()], X)
    again = as_dataset(X, seed=1)
    assert not torch.equal(data.test.stored, again.test.stored)


def test_parts_go_by_their_names():
    data = as_dataset({"train": (b for b in [(X, Y)]), "val": [X[:5]], "test": Split(X[:4])})
    assert [len(s) for s in (data.train, data.validation, data.test)] == [30, 5, 4]
    assert data.notes == ("data, train was read into memory: 1 batches",)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "no batches"),
        ([X, torch.zeros(3, 5)], "batch 2"),
        ([X, (X, Y)], "batch 2"),
        ([(X, Y, Y)], "which of them are inputs"),
        (["text"], "no tensor"),
        ([{"x": X, "text": ["a"] * 30}], "'text' is"),
        ("text", "give tensors"),
        (5, "give tensors"),
        ({"x": X, "train": [X]}, "name its parts"),
        ({"test": [X]}, "no part 'train'"),
        ([X[:2]], "cannot be parted"),
        ([{"x": X, "y": X[:3]}], "differ in their first dimension"),
    ],
)
def test_what_is_no_data_is_refused(data, said):
    with pytest.raises(gossamer.GossamerError, match=said):
        as_dataset(data)


def test_a_function_of_ones_own_separates():
    split, _ = as_split([(X, Y, X)], separate=lambda batch: ((batch[0], batch[2]), batch[1]))
    inputs, targets = split.batch(slice(0, 2))
    assert len(inputs) == 2
    assert torch.equal(targets, Y[:2])


def test_labels_leave_the_inputs():
    inputs, targets = separate({"x": X, "labels": Y, "mask": None})
    assert list(inputs) == ["x"]
    assert targets is Y


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".pt"])
def test_files_of_inputs(tmp_path, suffix):
    import numpy as np
    from safetensors.torch import save_file

    path = tmp_path / f"inputs{suffix}"
    if suffix == ".npy":
        np.save(path, X.numpy())
    elif suffix == ".npz":
        np.savez(path, x=X.numpy(), labels=Y.numpy())
    elif suffix == ".safetensors":
        save_file({"x": X, "labels": Y}, path)
    else:
        torch.save([(X, Y)], path)
    data = gossamer.datasets.load(str(path))
    assert data.name == path.name
    assert data.in_shape == (2,)
    assert (data.test.targets is None) == (suffix == ".npy")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".pt"])
def test_damaged_and_missing_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"inputs{suffix}"
    with pytest.raises(DatasetError, match="there is no file"):
        gossamer.datasets.load(str(path))
    path.write_bytes(b"damaged")
    with pytest.raises(DatasetError, match="cannot be read"):
        gossamer.datasets.load(str(path))


def test_a_dataset_is_returned_as_it_is():
    data = Dataset("d", Split(X, Y), Split(X, Y), Split(X, Y), 3)
    assert as_dataset(data) is data
