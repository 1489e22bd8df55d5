"""Networks from other tools' files: exported programs, TorchScript, transformers' folders.

Values come with them, so none of them is built untrained. Of an exported program and of TorchScript
the code comes with the file and runs when the network does: open those alone that you trust.
Nothing is unpickled but plain tensors.
"""

from __future__ import annotations

import contextlib
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.made import Scripted, mark

__all__ = ["SUFFIXES", "blank", "is_own", "is_source", "open_source"]

SUFFIXES = (".pt2", ".pt", ".pth", ".ts", ".jit", ".torchscript")
"""Of files that are networks, not only tensors."""
_HUB = "hf:"


def is_source(name: str) -> bool:
    """Whether a name is of something that :func:`open_source` opens.

    >>> is_source("net.pt2"), is_source("hf:gpt2"), is_source("net.py:make")
    (True, True, False)
    """
    return name.startswith(_HUB) or (":" not in name and name.endswith(SUFFIXES))


def is_own(name: str) -> bool:
    """Whether a name is of a user's own network, which has its values: of a function or a file."""
    return ":" in name or is_source(name)


def open_source(name: str) -> nn.Module:
    """The network, in evaluation mode.

    Args:
        name: ``net.pt2`` (``torch.export.save``), TorchScript (``torch.jit.save``; ``.pt``,
            ``.pth``, ``.ts``, ``.jit``, ``.torchscript``), or ``hf:`` and a folder of
            ``save_pretrained`` or a name of Hugging Face's hub.

    Raises :class:`ArgumentError` for what is not there or is no whole network,
    :class:`FormatError` for a file that cannot be read.
    """
    if name.startswith(_HUB):
        return _pretrained(name.removeprefix(_HUB))
    path = Path(name).expanduser()
    if not path.is_file():
        raise ArgumentError(f"network {name!r}: there is no file {path}")
    return _exported(path) if path.suffix == ".pt2" else _scripted(path)


@contextlib.contextmanager
def _only_tensors() -> Iterator[None]:
    """``torch.export.load`` unpickles some tensors of subclasses; here it may not."""
    load = torch.load

    def plain(*given: Any, **named: Any) -> Any:
        return load(*given, **{**named, "weights_only": True})

    torch.load = plain
    try:
        yield
    finally:
        torch.load = load


def _exported(path: Path) -> nn.Module:
    try:
        with _only_tensors():
            program = torch.export.load(path)
    except Exception as e:  # whatever a damaged archive leads to
        raise FormatError(f"{path} is no exported program that can be read ({_first(e)})") from e
    names = {s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or node.name not in names or not isinstance(value, Tensor):
            continue
        if value.ndim and isinstance(value.shape[0], int):
            raise ArgumentError(
                f"{path} was exported for batches of exactly {value.shape[0]} ({node.name}), and a "
                "run feeds batches of many sizes; export it with dynamic_shapes="
                "({0: torch.export.Dim.DYNAMIC},)"
            )
    graph = program.module()
    for key in ("train", "eval"):  # instances' own, which refuse: the graph has one mode
        vars(graph).pop(key, None)
    mark(graph)
    graph.eval()
    return graph


def _scripted(path: Path) -> nn.Module:
    code = False
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        code = any("/code/" in member for member in archive.namelist())
    if not code:
        raise ArgumentError(
            f"network {str(path)!r} holds tensors and no code; name the function that builds the "
            f"network (--model file.py:function) and give the file as weights (--weights {path})"
        )
    try:
        with warnings.catch_warnings():  # torch would rather see an exported program
            warnings.simplefilter("ignore", DeprecationWarning)
            script = torch.jit.load(str(path), map_location="cpu")
    except Exception as e:  # whatever a damaged archive leads to
        raise FormatError(f"{path} is no TorchScript that can be read ({_first(e)})") from e
    return Scripted(script).eval()


def blank(folder: str) -> nn.Module:
    """A network of transformers by its ``config.json``, with random weights; evaluation mode.

    Args:
        folder: that holds it.

    Raises :class:`ArgumentError` without the package, without the file, and for an architecture
    that the package does not have.
    """
    kind, config, _, _ = _configuration(folder)
    return kind(config).eval()


def _pretrained(where: str) -> nn.Module:
    kind, _, source, options = _configuration(where)
    try:
        model, told = kind.from_pretrained(  # type: ignore[attr-defined]
            source, **options, use_safetensors=True, output_loading_info=True
        )
    except Exception as e:
        raise ArgumentError(f"network 'hf:{where}' cannot be loaded: {_first(e)}") from e
    absent = [*told.get("missing_keys", ()), *told.get("mismatched_keys", ())]
    if absent:
        raise ArgumentError(
            f"network 'hf:{where}': its files do not hold {', '.join(map(str, absent[:4]))} of "
            f"{kind.__name__}, which would be random; fine-tune and save it first"
        )
    assert isinstance(model, nn.Module)
    return model.eval()


def _configuration(where: str) -> tuple[type[nn.Module], Any, str, dict[str, Any]]:
    """Class and configuration of a folder or name, where it lies, and how it is to be opened."""
    try:
        import transformers
    except ImportError as e:
        raise ArgumentError(
            f"network 'hf:{where}' needs transformers; pip install 'gossamer[transformers]'"
        ) from e
    folder = Path(where).expanduser()
    local = where.startswith((".", "/", "~")) or folder.exists()
    if local and not (folder / "config.json").is_file():
        raise ArgumentError(
            f"network 'hf:{where}': there is no {folder / 'config.json'}; give a folder that "
            "save_pretrained wrote"
        )
    source = str(folder) if local else where
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
    except Exception as e:  # the hub's, the file's, the library's
        raise ArgumentError(f"network 'hf:{where}': its configuration fails: {_first(e)}") from e
    named = (config.architectures or [""])[0]
    kind = getattr(transformers, named, None) if named else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ArgumentError(
            f"network 'hf:{where}': config.json names architecture {named!r}, which transformers "
            f"{transformers.__version__} does not have; code that comes with weights is not run, "
            "so build it yourself: --model file.py:function"
        )
    return kind, config, source, options


def _first(e: Exception) -> str:
    told = next((line.strip() for line in str(e).splitlines() if line.strip()), "")
    return f"{type(e).__name__}: {told[:300]}"
