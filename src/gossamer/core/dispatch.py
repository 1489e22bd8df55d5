"""Seeing a network's operations below autograd."""

from __future__ import annotations

import sys

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Watching"]


class Watching(TorchDispatchMode):
    """A mode whose ``__torch_dispatch__`` sees every operation, in a network that is not compiled.

    torch imports its whole compiler, seconds of processor time, only to tell it to leave such a
    mode alone; here that is done only in a process that has imported it.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return "torch._dynamo" in sys.modules
