"""Groups: which slices of which tensors live and die together.

A :class:`Group` is data and prints itself::

    conv1 filter[3]: conv1.weight[3], conv2.weight[:, 3]

A :class:`Family` holds alike groups of a layer as index tensors, so that the norms of all of them
are a few sums and their gradients a few products, however many there are. A weight that two
slices of a group share (the corner of an LSTM unit's row and column) counts once in it; groups
may overlap.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks

__all__ = ["Face", "Family", "Group", "Role", "Slice", "families", "masks_of", "zero_masks"]

Role = Literal["produces", "consumes", "scales"]

_LEVEL = re.compile(r"(?:weight|bias)_(?:ih|hh)(_l\d+(?:_reverse)?)")  # as torch names them


@dataclass(frozen=True)
class Slice:
    """Some indices along one axis of a parameter.

    Attributes:
        parameter: clean name.
        axis: of the tensor, or of the ``view``.
        index: along the axis, each once.
        role: ``produces`` makes the unit's values, ``consumes`` reads them, ``scales`` multiplies
            or shifts them (a norm's parameters).
        view: the shape that the tensor is seen in; () is its own. The lowered matrix of a
            convolution is (filters, channels * height * width).

    >>> print(Slice("conv2.weight", 1, (0, 1, 2, 7)))
    conv2.weight[:, 0:3+7]
    """

    parameter: str
    axis: int
    index: tuple[int, ...]
    role: Role = "produces"
    view: tuple[int, ...] = ()

    def __str__(self) -> str:
        """As torch indexes; runs of indices are ``first:behind the last``."""
        runs: list[list[int]] = []
        for i in self.index:
            if runs and i == runs[-1][1]:
                runs[-1][1] += 1
            else:
                runs.append([i, i + 1])
        shown = [str(a) if b == a + 1 else f"{a}:{b}" for a, b in runs]
        if len(shown) > 6:
            shown = [*shown[:4], "...", shown[-1]]
        seen = f".view{self.view}" if self.view else ""
        return f"{self.parameter}{seen}[{':, ' * self.axis}{'+'.join(shown)}]"


@dataclass(frozen=True)
class Group:
    """What is kept or removed as one.

    Attributes:
        kind: such as ``filter``, ``channel``, ``unit``, ``head``.
        name: its layer and number; one of a kind in a network.
        members: its slices.
    """

    kind: str
    name: str
    members: tuple[Slice, ...]

    def __str__(self) -> str:
        """Its name, then its members."""
        return f"{self.name}: {', '.join(map(str, self.members))}"


@dataclass(frozen=True, eq=False)
class Face:
    """One axis of a parameter, and which group each of its entries is in.

    Attributes:
        shape: of the parameter.
        view, axis, role: as in :class:`Slice`; the view is never ().
        entries, groups: pairs of an index along the axis and a group's number; int64.
    """

    parameter: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    axis: int
    entries: Tensor
    groups: Tensor
    role: Role = "produces"

    def sums(self, values: Tensor, count: int) -> Tensor:
        """Sum of a tensor over each group's entries; (count,)."""
        others = [i for i in range(len(self.view)) if i != self.axis]
        seen = _wide(values).reshape(self.view)
        along = seen.sum(others) if others else seen
        return along.new_zeros(count).index_add_(0, self.groups, along[self.entries])

    def along(self, per_group: Tensor) -> Tensor:
        """For each entry of the axis the sum of its groups' values; broadcasts over the view."""
        line = per_group.new_zeros(self.view[self.axis])
        line.index_add_(0, self.entries, per_group[self.groups])
        return line.view([-1 if i == self.axis else 1 for i in range(len(self.view))])


class Family:
    """Alike groups of a layer.

    Attributes:
        kind: of all of them.
        layer: clean name of the layer (of the first member where several belong together).
        count: number of groups.
        faces: which entries of which tensors are whose.
    """

    def __init__(
        self,
        kind: str,
        layer: str,
        count: int,
        faces: Sequence[Face],
        *,
        names: Callable[[int], str] | None = None,
        sparse: tuple[int, int] | None = None,
    ) -> None:
        self.kind, self.layer, self.count, self.faces = kind, layer, count, tuple(faces)
        self.sparse = sparse  # N of M stay inside each group
        self._name = names or (lambda i: f"{layer} {kind}[{i}]")
        self._shared = _corners(self.faces)

    def __len__(self) -> int:
        """Number of groups."""
        return self.count

    def name(self, number: int) -> str:
        """Of one group."""
        return self._name(number)

    def __getitem__(self, number: int) -> Group:
        """One group as data."""
        if not 0 <= number < self.count:
            raise IndexError(number)
        members = []
        for face in self.faces:
            index = face.entries[face.groups == number]
            if len(index):
                view = () if face.view == face.shape else face.view
                entries = tuple(sorted(index.tolist()))
                members.append(Slice(face.parameter, face.axis, entries, face.role, view))
        return Group(self.kind, self.name(number), tuple(members))

    def __iter__(self) -> Iterator[Group]:
        """Every group as data."""
        return (self[i] for i in range(self.count))

    def __repr__(self) -> str:
        """Kind, layer and number."""
        return f"<{self.count} {self.kind} groups of {self.layer}>"

    @property
    def parameters(self) -> list[str]:
        """Clean names, in the order of the faces, each once."""
        return list(dict.fromkeys(face.parameter for face in self.faces))

    def to(self, device: torch.device) -> Family:
        """The same with its index tensors on a device."""
        if all(f.entries.device == device for f in self.faces):
            return self
        faces = [
            Face(f.parameter, f.shape, f.view, f.axis, f.entries.to(device), f.groups.to(device),
                 f.role)
            for f in self.faces
        ]  # fmt: skip
        return Family(
            self.kind, self.layer, self.count, faces, names=self._name, sparse=self.sparse
        )

    def weights_only(self) -> Family:
        """Without parameters of one dimension (biases, norms), which penalties leave alone."""
        faces = [f for f in self.faces if len(f.shape) > 1]
        return Family(
            self.kind, self.layer, self.count, faces, names=self._name, sparse=self.sparse
        )

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise :class:`ArgumentError` unless every parameter is there in its shape."""
        for face in self.faces:
            if face.parameter not in tensors:
                raise ArgumentError(
                    f"{self!r}: there is no parameter {face.parameter!r}; there are: "
                    + ", ".join([*tensors][:40])
                )
            if tuple(tensors[face.parameter].shape) != face.shape:
                raise ArgumentError(
                    f"{self!r}: {face.parameter} has shape "
                    f"{tuple(tensors[face.parameter].shape)}, the groups are of {face.shape}"
                )

    def sums(self, values: Mapping[str, Tensor]) -> Tensor:
        """Sum over each group's weights of a value per weight (name -> tensor); (count,).

        A parameter without a value adds nothing.
        """
        total: Tensor | None = None
        for face in self.faces:
            if face.parameter in values:
                part = face.sums(values[face.parameter], self.count)
                total = part if total is None else total + part
        if total is None:
            raise ArgumentError(
                f"{self!r}: values has none of {', '.join(self.parameters)}; give some"
            )
        for parameter, places, groups in self._shared:
            if parameter in values:
                twice = _wide(values[parameter]).reshape(-1)[places]
                total.index_add_(0, groups, -twice)
        return total

    def sizes(self) -> Tensor:
        """Number of weights in each group; float32, (count,)."""
        return self.sums({f.parameter: torch.ones(f.shape) for f in self._on("cpu").faces})

    def _on(self, device: str) -> Family:
        return self.to(torch.device(device))

    def norms(self, weights: Mapping[str, Tensor]) -> Tensor:
        """L2 norm of each group; (count,)."""
        squares = self.sums({n: _wide(weights[n].detach()).square() for n in self.parameters})
        return squares.clamp_min(0).sqrt()

    def spread(self, per_group: Tensor, parameter: str) -> Tensor:
        """For each weight of a parameter the sum of its groups' values; of the weight's shape."""
        mine = [f for f in self.faces if f.parameter == parameter]
        if not mine:
            raise ArgumentError(f"{self!r} has no weight of {parameter!r}")
        shape, total = mine[0].shape, per_group.new_zeros(mine[0].shape)
        for face in mine:
            total += face.along(per_group).expand(face.view).reshape(shape)
        for name, places, groups in self._shared:
            if name == parameter:
                total.view(-1).index_add_(0, places, -per_group[groups])
        return total


def _wide(values: Tensor) -> Tensor:
    """Halves as float32: sums over a group need the digits."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _corners(faces: Sequence[Face]) -> list[tuple[str, Tensor, Tensor]]:
    """Weights that two faces give to one group: parameter, flat places, groups."""
    found = []
    for i, a in enumerate(faces):
        for b in faces[:i]:
            if b.parameter != a.parameter:
                continue
            if a.view != b.view or a.axis == b.axis or len(a.view) != 2:
                if bool(torch.isin(a.groups, b.groups).any()):
                    raise ArgumentError(
                        f"a group has slices of {a.parameter} in different views or along one "
                        "axis; give one slice of the flat view"
                    )
                continue
            rows, columns = (a, b) if a.axis == 0 else (b, a)
            same = rows.groups[:, None] == columns.groups[None, :]
            r, c = same.nonzero(as_tuple=True)
            places = rows.entries[r] * a.view[1] + columns.entries[c]
            found.append((a.parameter, places, rows.groups[r]))
    return found


def _flat(piece: Slice, shape: tuple[int, ...]) -> Tensor:
    """The flat places of a slice's weights."""
    places = torch.arange(math.prod(shape)).view(piece.view or shape)
    return places.index_select(piece.axis, torch.tensor(piece.index)).reshape(-1)


def _merged(group: Group, shapes: Mapping[str, tuple[int, ...]]) -> list[Slice]:
    """A group's slices, those of one face as one, and at most two faces that cross a matrix."""
    by: dict[str, dict[tuple[int, tuple[int, ...]], Slice]] = {}
    for piece in group.members:
        shape = shapes.get(piece.parameter)
        if shape is None:
            raise ArgumentError(f"{group.name}: there is no parameter {piece.parameter!r}")
        view = piece.view or shape
        if math.prod(view) != math.prod(shape) or not 0 <= piece.axis < len(view):
            raise ArgumentError(f"{group.name}: {piece} does not fit a tensor of shape {shape}")
        if not all(0 <= i < view[piece.axis] for i in piece.index):
            raise ArgumentError(f"{group.name}: {piece} lies outside a tensor of shape {shape}")
        known = by.setdefault(piece.parameter, {})
        before = known.get((piece.axis, view))
        index = tuple(sorted({*piece.index, *(before.index if before else ())}))
        role = before.role if before else piece.role
        known[piece.axis, view] = Slice(piece.parameter, piece.axis, index, role, view)
    pieces = []
    for name, known in by.items():
        mine, shape = list(known.values()), shapes[name]
        crossing = len(mine) == 2 and mine[0].view == mine[1].view and len(mine[0].view) == 2
        if len(mine) > 1 and not crossing:
            places = torch.cat([_flat(piece, shape) for piece in mine]).unique()
            whole = (math.prod(shape),)
            mine = [Slice(name, 0, tuple(places.tolist()), mine[0].role, whole)]
        pieces += mine
    return pieces


def families(groups: Iterable[Group], tensors: Mapping[str, Tensor]) -> list[Family]:
    """Groups as families: those of one kind and first layer together, in the order given.

    Each level of a recurrent module is a layer, for budgets and floors are of layers.

    Raises :class:`ArgumentError` for members that do not fit the tensors.
    """
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    alike: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        if not group.members:
            raise ArgumentError(f"group {group.name!r} has no members")
        layer = _layer(group.members[0].parameter)
        alike.setdefault((group.kind, layer), []).append(group)
    return [_family(kind, layer, mine, shapes) for (kind, layer), mine in alike.items()]


def _layer(parameter: str) -> str:
    layer, _, leaf = parameter.rpartition(".")
    level = _LEVEL.fullmatch(leaf)
    if level is None:
        return layer or parameter
    return f"{layer}{level[1]}" if layer else level[1].lstrip("_")


def _family(
    kind: str, layer: str, groups: Sequence[Group], shapes: Mapping[str, tuple[int, ...]]
) -> Family:
    merged = [_merged(group, shapes) for group in groups]
    # one group's flat places and another's rows cannot share a face list unseen: views differ,
    # which is fine between groups and is checked within each
    faces: dict[tuple[str, int, tuple[int, ...], Role], tuple[list[int], list[int]]] = {}
    for number, pieces in enumerate(merged):
        for piece in pieces:
            key = (piece.parameter, piece.axis, piece.view, piece.role)
            entries, owners = faces.setdefault(key, ([], []))
            entries += piece.index
            owners += [number] * len(piece.index)
    made = [
        Face(name, shapes[name], view, axis, torch.tensor(entries), torch.tensor(owners), role)
        for (name, axis, view, role), (entries, owners) in faces.items()
    ]
    titles = [group.name for group in groups]
    return Family(kind, layer, len(groups), made, names=titles.__getitem__)


def masks_of(kept: Iterable[tuple[Family, Tensor]]) -> Masks:
    """Masks that remove every weight of each group that is not kept.

    Args:
        kept: families, each with a bool tensor (count,).

    A weight in several groups goes with the first of them that goes.
    """
    masks = Masks()
    for family, keep in kept:
        removed = (~keep).float()
        for name in family.parameters:
            stays = family.spread(removed.to(family.faces[0].entries.device), name) < 0.5
            masks[name] = masks[name] & stays if name in masks else stays
    return masks


@torch.no_grad()
def zero_masks(given: Iterable[Family], weights: Mapping[str, Tensor]) -> Masks:
    """Masks that hold the groups which are zero throughout, and nothing else."""
    return masks_of((f, f.norms(weights) > 0) for f in given)
