"""Methods in a Lightning Trainer.

Lightning loads a checkpoint into the module before there is an optimizer, and into the optimizer
after. A method that puts parameters of its own in the weights' place is therefore attached twice:
to the module before the first, to the optimizer before the second.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.core.errors import ArgumentError
from gossamer.core.method import Method
from gossamer.integrations.attached import KEY, Attached
from gossamer.integrations.extras import absent

try:
    from lightning.pytorch.callbacks import Callback
except (ImportError, RuntimeError) as e:  # a torchvision of another torch is the latter
    Callback = absent("lightning", e)

__all__ = ["MethodCallback"]


class MethodCallback(Callback):
    """Methods in a ``lightning.Trainer``, from the start of ``fit`` to its end.

    Their state is in the optimizer's in every checkpoint; ``trainer.fit(..., ckpt_path=...)``
    restores it, with the states of the random number generators, which Lightning does not keep.
    A run resumed from a checkpoint at the end of an epoch has the bits of the unbroken one; in
    the middle of an epoch Lightning begins the data anew, unless the loader has a state.

    Args:
        methods: attached in this order; make them as they were when a run goes on.
        model: what they are attached to, a part of the module; None: the module itself.

    Attributes:
        attached: the methods, model and optimizer; None before ``fit``.

    Raises :class:`ArgumentError` on ``fit`` as :class:`gossamer.integrations.attached.Attached`
    does, for more than one optimizer (:meth:`attach` says which), for a sharded module (FSDP,
    DeepSpeed), and for a checkpoint that lacks the methods' state or was not restored whole.
    """

    def __init__(self, methods: Sequence[Method], model: nn.Module | None = None) -> None:
        super().__init__()
        self.methods, self.model = tuple(methods), model
        self.attached: Attached | None = None
        self._random: dict[str, Any] | None = None

    def attach(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Attach to this optimizer.

        Called by itself when ``fit`` begins. Call it in ``configure_optimizers`` where there are
        several optimizers, or a method gives parameters a group of their own (such as the scales
        of :class:`gossamer.TTQ` with another ``weight_decay``) and a learning-rate scheduler is
        made next.
        """
        for method in self.methods:
            method.detach()
        model = module if self.model is None else self.model
        self.attached = Attached(self.methods, model, optimizer)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put parametrizations in, before the module's state is loaded."""
        if stage != "fit":
            return
        if self.attached is not None:
            raise ArgumentError("these methods were in a fit() already; make them anew")
        if trainer.strategy.restore_checkpoint_after_setup:
            raise ArgumentError(
                f"{type(trainer.strategy).__name__} shards the module; use one process or 'ddp'"
            )
        for method in self.methods:
            if method.parametrizes:
                method.attach(pl_module if self.model is None else self.model)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizer, before its state is loaded."""
        if self.attached is None:
            if len(trainer.optimizers) != 1:
                raise ArgumentError(
                    f"the module has {len(trainer.optimizers)} optimizers; call the callback's "
                    "attach(module, optimizer) in configure_optimizers with the one that trains "
                    "the weights"
                )
            self.attach(pl_module, trainer.optimizers[0])
        if self._random is not None:
            _set_random(self._random)  # before the loader's first epoch is shuffled

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that a resume is whole."""
        if self.attached is not None:
            self.attached.check_resumed(trainer.global_step)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish the methods, after the last checkpoint."""
        if self.attached is not None:
            self.attached.finish()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the random number generators."""
        checkpoint[KEY] = _get_random()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take them; they are set when all is set up."""
        self._random = checkpoint.get(KEY)


def _get_random() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (libraries draw from it)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest],
    }


def _set_random(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
