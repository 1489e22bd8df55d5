"""Methods in the Hugging Face Trainer, and networks of theirs in a folder with a ``.gsm`` file.

The Trainer makes its optimizer before it loads a checkpoint into model and optimizer; the methods
are attached in between, when the callback is made, so that every name and every parameter group
is there to be loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gossamer.core import hooks
from gossamer.core.errors import ArgumentError
from gossamer.core.method import Method
from gossamer.integrations.attached import KEY, Attached
from gossamer.integrations.extras import absent
from gossamer.integrations.pretrained import from_pretrained, save_pretrained

try:
    from transformers import TrainerCallback
except (ImportError, RuntimeError) as e:  # a torchvision of another torch is the latter
    TrainerCallback = absent("transformers", e)

__all__ = ["MethodCallback", "from_pretrained", "last_checkpoint", "save_pretrained"]


class MethodCallback(TrainerCallback):
    """Methods in a ``transformers.Trainer``, from here to the end of its training.

    It adds itself to the trainer, makes the trainer's optimizer and attaches the methods. Their
    state is in ``optimizer.pt`` of every checkpoint; ``trainer.train(resume_from_checkpoint=...)``
    restores it, to the bits of the unbroken run. At the end they are finished: plain tensors.

    Args:
        trainer: before ``train()``.
        methods: attached in this order; make them as they were when a run goes on.

    Attributes:
        attached: the methods, model and optimizer.

    Raises :class:`ArgumentError` for a trainer that makes model or optimizer anew or in shards
    (``model_init``, ``auto_find_batch_size``, DeepSpeed, FSDP), and as
    :class:`gossamer.integrations.attached.Attached` does; on ``train()`` for a checkpoint that
    lacks the methods' state, or whose weights were not restored whole.
    """

    def __init__(self, trainer: Any, methods: Sequence[Method]) -> None:
        refused = {
            "model_init": getattr(trainer, "model_init", None) is not None,
            "auto_find_batch_size": trainer.args.auto_find_batch_size,
            "DeepSpeed": trainer.is_deepspeed_enabled,
            "FSDP": trainer.is_fsdp_enabled,
        }
        for name, used in refused.items():
            if used:
                raise ArgumentError(
                    f"the trainer uses {name}, which makes model or optimizer anew after the "
                    "methods are attached; train without it"
                )
        trainer.create_optimizer()
        self.attached = Attached(methods, trainer.model, trainer.optimizer)
        self._untie = _declare_ties(trainer.model)
        self._finished = False
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **beside: Any) -> None:
        """Check that methods and optimizer are still each other's, and a resume whole."""
        if self._finished:
            raise ArgumentError(
                "the methods were finished at the end of train(); to train on, make them and a "
                "MethodCallback anew, on a new trainer"
            )
        if hooks.unwrap(beside["optimizer"]) is not self.attached.optimizer:
            raise ArgumentError(
                "the trainer has another optimizer than when the MethodCallback was made; make "
                "the callback after the optimizer is set"
            )
        self.attached.check_resumed(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **beside: Any) -> None:
        """Finish the methods; where the best model was loaded, in its state."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            path = Path(state.best_model_checkpoint) / "optimizer.pt"
            if not path.is_file():
                raise ArgumentError(
                    f"load_best_model_at_end needs {path}, where the methods' state of the best "
                    "step is; set save_only_model=False"
                )
            saved = torch.load(path, map_location="cpu", weights_only=True)
            self.attached.load_state_dict(saved[KEY])
        self.attached.finish()
        self._untie()
        self._finished = True


def _declare_ties(model: Any) -> Callable[[], None]:
    """Tell transformers which parametrized tensors are tied: it saves no others that share memory.

    What is returned takes it back.
    """
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        same = first.setdefault(id(tensor), name)
        if same != name and ".parametrizations." in name:
            ties[name] = same
    before = vars(model).get("_tied_weights_keys")
    if ties:
        model._tied_weights_keys = {**(getattr(model, "_tied_weights_keys", None) or {}), **ties}

    def untie() -> None:
        if before is not None:
            model._tied_weights_keys = before
        elif ties:
            del model._tied_weights_keys  # the class's own shows again

    return untie


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole ``checkpoint-N`` of a trainer's folder; None where there is none.

    For ``trainer.train(resume_from_checkpoint=last_checkpoint(folder))``: a kill while one was
    being written leaves it without the file that the Trainer writes last.
    """
    whole = {
        int(path.parent.name.rpartition("-")[2]): str(path.parent)
        for path in Path(folder).glob("checkpoint-*/trainer_state.json")
        if path.parent.name.rpartition("-")[2].isdecimal()
    }
    return whole[max(whole)] if whole else None
