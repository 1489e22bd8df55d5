"""What a stage of a recipe is: its settings, what is true of it, and what it does.

A stage is one class in one file. Defining it makes it known to the recipe language: the order
checks, the allowed settings, the table of the documentation and the report read its facts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from gossamer.compression.layers import check_setting, chosen, per_layer, trying
from gossamer.compression.settings import Strict, Training
from gossamer.compression.state import State
from gossamer.core.tables import Table

__all__ = ["STAGES", "LayerStage", "Stage", "aiming", "blind", "trainings"]

STAGES: Table[type[Stage]] = Table("stage")
"""Stage name -> its class."""


class Stage(Strict):
    """One step of a recipe. A subclass gives a field ``stage: Literal["name"] = "name"``.

    Attributes:
        compresses: the network before the first such stage is what the run is compared with.
        shares: leaves values shared or in place, which plain training would tear apart.
        rebuilds: the network is another after it: weights from the run's start fit no longer.
        absorbs: batch-norm has no statistics of its own after it, which a training would put back.
        foreseen: what it does to the size of the file can be tried on a copy: it trains nothing.
        only_before: the stages that may follow; None: any. ``otherwise`` says why not another,
            with the other's name for ``{}``.
    """

    stage: str

    compresses: ClassVar[bool] = True
    shares: ClassVar[bool] = False
    rebuilds: ClassVar[bool] = False
    absorbs: ClassVar[bool] = False
    foreseen: ClassVar[bool] = False
    only_before: ClassVar[tuple[str, ...] | None] = None
    otherwise: ClassVar[str] = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        name = cls.model_fields["stage"].default
        if isinstance(name, str):
            STAGES.register(name, cls)

    @property
    def from_start(self) -> bool:
        """Whether it reads the weights that the run began with."""
        return False

    @property
    def aims(self) -> bool:
        """Whether it sets a price of bits, and can be told the size of the file."""
        return False

    @property
    def resets(self) -> bool:
        """Whether it goes back to them, and so undoes what the stages before did to values."""
        return False

    @property
    def needs_masks(self) -> str:
        """Why it cannot do without what an earlier stage has pruned; empty where it can."""
        return ""

    @property
    def labels(self) -> str:
        """Why it cannot do without labels, in words; empty where it can."""
        return ""

    @property
    def retrains(self) -> bool:
        """Whether it trains weights freely, those whose values are shared among them."""
        return False

    def check(self, model: nn.Module) -> None:
        """Raise :class:`ArgumentError` where the settings do not fit a network.

        An error's ``key``, where there is one, is the path below the stage.
        """

    def covered(self, model: nn.Module) -> set[str] | None:
        """Clean names of the parameters it acts on; None where it is not about layers."""
        return None

    @abstractmethod
    def run(self, state: State) -> None:
        """Do it.

        What the report shows of it goes to ``state.notes``, under the name of the section.
        """


class LayerStage(Stage):
    """A stage that acts on layers: ``include`` and ``exclude`` are patterns of names.

    Attributes:
        by_layer: settings that may be given by layer pattern; a layer that none names is left.
    """

    include: list[str] | None = None
    exclude: list[str] | None = None

    by_layer: ClassVar[tuple[str, ...]] = ()

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights that it acts on, by clean name.

        Raises :class:`ArgumentError` for a pattern that matches nothing, or when nothing is left.
        """
        return chosen(model, self.include, self.exclude)

    def check(self, model: nn.Module) -> None:
        """Try every pattern."""
        for key in ("include", "exclude"):
            with trying(key):
                chosen(model, **{key: getattr(self, key)})
        weights = self.weights(model)
        for key in self.by_layer:
            check_setting(model, weights, key, getattr(self, key))

    def covered(self, model: nn.Module) -> set[str] | None:
        """The weights, without those that a setting by layer does not name."""
        weights = self.weights(model)
        found = set(weights)
        for key in self.by_layer:
            value = getattr(self, key)
            if isinstance(value, Mapping):
                found &= set(per_layer(model, weights, value))
        return found


def trainings(stage: Stage) -> list[Training]:
    """The trainings in a stage's settings, itself where it is one."""
    found = [stage, *(getattr(stage, key) for key in type(stage).model_fields)]
    return [one for one in found if isinstance(one, Training) and one.epochs]


def aiming(stages: Sequence[Stage]) -> int | None:
    """Which stage is told the size: the last that can be; None: none can."""
    return max((i for i, stage in enumerate(stages) if stage.aims), default=None)


def blind(stages: Sequence[Stage]) -> str:
    """Why a size cannot be asked of these stages, in words; empty where it can."""
    at = aiming(stages)
    if at is None:
        able = sorted(name for name, kind in STAGES.items() if kind.aims is not Stage.aims)
        return f"no stage sets a price of bits; add one of {', '.join(able)}"
    unseen = next((s.stage for s in stages[at + 1 :] if not s.foreseen), None)
    if unseen is None:
        return ""
    return (
        f"{stages[at].stage} is told the size, and what {unseen} after it does to the file cannot "
        f"be foreseen; move {unseen} before it"
    )
