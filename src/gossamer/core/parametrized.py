"""Methods that put another parameter in a weight's place: attach, swap, restore, finish, once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError
from gossamer.core.latent import Computed, Latent, adopt, release, swap
from gossamer.core.method import Method

__all__ = ["Parametrized"]


class Parametrized(Method, ABC):
    """Base of the methods whose weights are computed from another parameter while they train.

    From :meth:`attach` to :meth:`finish` that parameter, the latent one, is the module's and
    stands in the optimizer's groups; every read of the weight gives what is computed from it.

    Attributes:
        weight_decay: of parameters beside the latent ones; None: their group's.
        lr_factor: their learning rate over that of the weight's group.
    """

    parametrizes = True
    weight_decay: float | None = None
    lr_factor: float = 1.0

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[str, Latent] = {}

    @abstractmethod
    def _weights(self) -> Mapping[str, nn.Parameter]:
        """The weights by clean name, checked; nothing is changed yet."""

    @abstractmethod
    def _modules(self, weights: Mapping[str, nn.Parameter]) -> Mapping[str, Computed]:
        """The parametrization of each; raise before anything is changed."""

    def _check(self) -> None:
        """Look at the optimizer, each time that one is attached."""

    def _begin(self, latents: Mapping[str, Latent]) -> None:
        """Everything is checked; the parametrizations are about to be put in."""

    def _begun(self) -> None:
        """The parametrizations have been put in, for the first time."""

    def _setup(self) -> None:
        new = not self._held  # else detached and attached again, to another optimizer perhaps
        if new:
            weights = self._weights()
            latents = {name: Latent(self.model, name, p) for name, p in weights.items()}
            self._holds(weights)
            self._check()
            with torch.no_grad():
                modules = self._modules(weights)
            self._begin(latents)
            for name, held in latents.items():
                held.register(modules[name])
            self._held = latents
        else:
            self._check()
        swap(self.optimizer, {held.plain: held.parameter for held in self._held.values()})
        adopt(self.optimizer, self._beside(), self.weight_decay, self.lr_factor)
        if new:
            self._begun()

    def _holds(self, weights: Mapping[str, nn.Parameter]) -> None:
        if self.optimizer is None:
            return
        mine = {id(p) for p in weights.values()}
        if not any(id(p) in mine for group in self.optimizer.param_groups for p in group["params"]):
            raise ArgumentError(
                f"the optimizer holds none of the weights of {type(self).__name__}; make it from "
                "model.parameters()"
            )

    def _beside(self) -> dict[nn.Parameter, nn.Parameter]:
        """Parameters of the parametrizations themselves -> the latent one beside them."""
        return {p: held.parameter for held in self._held.values() for p in held.module.parameters()}

    def _guarded(self) -> Iterable[Tensor]:
        return [*(held.parameter for held in self._held.values()), *self._beside()]

    def _replaced(self) -> Iterable[Tensor]:
        return [held.plain for held in self._held.values()]

    @torch.no_grad()
    def values(self) -> dict[str, Tensor]:
        """The weights as they are computed now, by clean name."""
        return {n: held.module(held.parameter).detach() for n, held in self._held.items()}

    @torch.no_grad()
    def finish(self) -> None:
        """Plain weights again, as they were computed last, in the model and in the optimizer."""
        values = self.values()
        release(self.optimizer, self._beside())
        swap(self.optimizer, {held.parameter: held.plain for held in self._held.values()})
        for name, held in self._held.items():
            held.restore(values[name])
        self._held = {}
        self.detach()
