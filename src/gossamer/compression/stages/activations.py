"""ReLUs of few levels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from gossamer.compression import records
from gossamer.compression.parts import examples
from gossamer.compression.settings import Alpha, Training
from gossamer.compression.stage import Stage
from gossamer.compression.state import State, ends_of
from gossamer.quantize import QuantizedReLU, capture
from gossamer.quantize.activations import quantize_activations_

__all__ = ["Activations"]


class Activations(Stage):
    """ReLUs of few levels, trained through a straight-through estimator.

    The file holds each alpha and tells of the changed modules; :func:`gossamer.load` makes them.

    Attributes:
        bits: levels 0 to 2^bits - 1.
        estimator: what stands for the derivative.
        form: the level above (``ceil``, the paper's), or the nearest one (``round``).
        alpha: distance of two levels: of least squared error on training data (``lloyd``) or for
            normal inputs (``half-gaussian``), the former as the start of a trained one
            (``learned``), or a number for all layers.
        functional: replace called ReLUs too, in a captured graph.
        include, exclude: patterns of activations, by module or node name.
        train: the training.
    """

    stage: Literal["activations"] = "activations"
    bits: Annotated[int, Field(ge=2, le=8)]
    estimator: Literal["identity", "relu", "clipped"] = "clipped"
    form: Literal["ceil", "round"] = "ceil"
    alpha: Alpha = "lloyd"
    functional: bool = True
    include: list[str] | None = None
    exclude: list[str] | None = None
    train: Training | None = None

    rebuilds: ClassVar[bool] = True

    @property
    def retrains(self) -> bool:
        """Where it trains at all."""
        return self.train is not None

    def check(self, model: nn.Module) -> None:
        """Find the activations."""
        capture.activations(model, self.functional, self.include, self.exclude)

    def run(self, state: State) -> None:
        """Quantized ReLUs in the place of ReLUs, and the training through them."""
        _, found = capture.activations(state.model, self.functional, self.include, self.exclude)
        on_data = self.alpha in ("lloyd", "learned")
        device = next(state.model.parameters()).device
        given = examples(state.data.train, 1024, state.generator(98)) if on_data else []
        model = quantize_activations_(
            state.model,
            self.bits,
            estimator=self.estimator,
            form=self.form,
            alpha=self.alpha if isinstance(self.alpha, float) else None,
            calibration=[x.to(device) for x in given] if on_data else None,
            learned=self.alpha == "learned",
            include=list(found),
            functional=self.functional,
        )
        record = records.Activations(
            bits=self.bits,
            estimator=self.estimator,
            form=self.form,
            learned=self.alpha == "learned",
            functional=self.functional,
            layers=tuple(found),
        )
        state.change(model, record)
        before = _alphas(model, found)
        notes: dict[str, Any] = {"bits": self.bits, "estimator": self.estimator}
        if self.train is not None and self.train.epochs:
            notes |= ends_of(state.train(self.train, state.others(())))
        after = _alphas(model, found)
        notes["layers"] = [{"name": n, "start": before[n], "alpha": after[n]} for n in found]
        state.notes["activations"] = notes


def _alphas(model: nn.Module, found: Mapping[str, Any]) -> dict[str, float]:
    alphas = {}
    for name in found:
        module = model.get_submodule(name)
        assert isinstance(module, QuantizedReLU)  # what has just been put there
        alphas[name] = abs(float(module.alpha.detach()))
    return alphas
