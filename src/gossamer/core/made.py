"""Networks that are graphs already, without the modules that they were written with.

An exported program and TorchScript keep a network's parameters under their names, and its code as
a graph: no module is a ``Linear`` any more. Here the modules whose matrices are multiplied with say
so (``multiplies``, which :func:`gossamer.core.names.matrices` reads), and TorchScript becomes a
module whose parameters are its own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from gossamer.core.errors import ArgumentError

__all__ = ["Scripted", "mark"]

# What multiplies its inputs, by the name of the operation without its package.
_MULTIPLY = {
    "addbmm", "addmm", "addmv", "baddbmm", "bilinear", "bmm", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "einsum", "gru",
    "linear", "lstm", "matmul", "mm", "mv", "rnn_relu", "rnn_tanh",
}  # fmt: skip
# What gives the same values in another shape or type.
_PASS = {
    "_to_copy", "chunk", "contiguous", "expand", "flatten", "getitem", "mT", "narrow", "permute",
    "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "to", "transpose",
    "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip
# The kinds of modules, as TorchScript remembers them, whose matrices are multiplied with.
_KINDS = {
    "Bilinear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d",
    "ConvTranspose3d", "GRU", "GRUCell", "LSTM", "LSTMCell", "Linear", "MultiheadAttention",
    "NonDynamicallyQuantizableLinear", "RNN", "RNNCell",
}  # fmt: skip


def _operation(node: fx.Node) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    return name.partition(".")[0]


def mark(graph: fx.GraphModule) -> fx.GraphModule:
    """Let the modules of an exported program whose matrices are multiplied say so.

    >>> program = torch.export.export(nn.Sequential(nn.Linear(2, 2)), (torch.zeros(1, 2),))
    >>> mark(program.module()).get_submodule("0").multiplies
    True

    Raises :class:`ArgumentError` for a program that was exported in training mode.
    """
    for node in graph.graph.nodes:
        if _trains(node):
            raise ArgumentError(
                f"the program was exported in training mode ({node.name}); call model.eval() "
                "before torch.export.export"
            )
        if node.op == "get_attr" and _multiplied(node):
            module: Any = graph.get_submodule(str(node.target).rpartition(".")[0])
            module.multiplies = True
    return graph


def _multiplied(node: fx.Node) -> bool:
    for user in node.users:
        operation = _operation(user) if user.op == "call_function" else ""
        if operation in _MULTIPLY or (operation in _PASS and _multiplied(user)):
            return True
    return False


def _trains(node: fx.Node) -> bool:
    """Whether an operation does what it does in training alone."""
    operation, flag = _operation(node), False
    if node.op != "call_function":
        return False
    if operation == "dropout":
        flag = len(node.args) > 2 and node.args[2] is True
    elif operation in ("batch_norm", "native_batch_norm"):
        flag = len(node.args) > 5 and node.args[5] is True and node.args[3] is not None
    elif operation == "_native_batch_norm_legit_functional":
        flag = True
    return flag


class Scripted(nn.Module):
    """A TorchScript network as a module, whose parameters and buffers are the script's own tensors.

    They may be written to and trained; they cannot be replaced, for the script would not see it.

    Args:
        script: as ``torch.jit.load`` gives it.

    Raises :class:`ArgumentError` for a frozen one, whose weights are constants of its code.
    """

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        super().__init__()
        if next(script.parameters(), None) is None:
            raise ArgumentError(
                "the TorchScript network has no parameters: torch.jit.freeze has made them "
                "constants of its code; save it before it is frozen"
            )
        self._script = (script,)  # hidden: its tensors are this module's
        _mirror(self, script)
        self._own = dict([*script.named_parameters(), *script.named_buffers()])
        self.training = script.training

    def forward(self, *given: Any, **named: Any) -> Any:
        """What the script gives.

        Raises :class:`ArgumentError` where a method has replaced one of its tensors.
        """
        held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, tensor in self._own.items():
            if held.get(name) is not tensor:
                raise ArgumentError(
                    f"{name} has been replaced, which TorchScript does not see; give the nn.Module "
                    "that it was made from, or methods that write to its weights in place"
                )
        return self._script[0](*given, **named)

    def train(self, mode: bool = True) -> Scripted:
        """The mode of the script as well."""
        self._script[0].train(mode)
        super().train(mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Scripted:
        return Scripted(copy.deepcopy(self._script[0]))


def _mirror(into: nn.Module, script: nn.Module) -> None:
    """Modules of the same names, which hold the script's tensors."""
    if getattr(script, "original_name", "") in _KINDS:
        multiplies: Any = into
        multiplies.multiplies = True
    tensors: Any = into
    for name, p in script.named_parameters(recurse=False):
        tensors._parameters[name] = p
    for name, b in script.named_buffers(recurse=False):
        tensors._buffers[name] = b
    for name, child in script.named_children():
        inner = nn.Module()
        _mirror(inner, child)
        into.add_module(name, inner)
