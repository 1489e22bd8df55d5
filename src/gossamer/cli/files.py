"""Commands on packed files: pack, unpack, inspect."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer.cli.options import AsJson, Key, Threads, smaller
from gossamer.cli.program import app
from gossamer.compression.progress import console
from gossamer.core.columns import columns
from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.files import shown

__all__ = ["inspect", "pack", "unpack"]


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="A .safetensors, .pt, .pth or .net file.")],
    file: Annotated[Path, typer.Argument(help="The .gsm file to write.")],
    profile: Annotated[str, typer.Option(help="smallest, fast or huffman.")] = "smallest",
    key: Key = None,
    model: Annotated[
        str | None, typer.Option(help="Of a .net file: the network, which has names and shapes.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Pack tensors losslessly into a small file."""
    from gossamer import nets
    from gossamer.compression import inputs
    from gossamer.pack import Archive
    from gossamer.pack import pack as write

    if file.suffix != ".gsm":  # by which every command knows it
        raise ArgumentError(f"{file}: end its name in .gsm")
    network = None if model is None else nets.build(model)
    state = inputs.read_state(source, key, model=network)
    metadata = None
    if source.suffix == ".gsm":  # which tells of changes to the network's modules
        with Archive(source) as packed:
            metadata = packed.metadata or None
    with (
        console() as show,
        write(
            state,
            file,
            profile=profile,
            metadata=metadata,
            progress=lambda name, done, total: show.count("pack", done, total, name),
        ) as archive,
    ):
        size, dense = archive.file_bytes, archive.dense_bytes
    print(f"{file}: {size:,} bytes for {dense:,}: {smaller(dense, size)}, lossless")


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(help="A .gsm file.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors or .net file to write.")],
    coded: Annotated[
        bool, typer.Option("--coded", help="safetensors with codes and code books.")
    ] = False,
) -> None:
    """Decode a packed file to a plain safetensors file, or to the layout of Deep Compression."""
    from gossamer.compression import inputs, records
    from gossamer.pack import unpack as read
    from gossamer.pack.safetensors_io import save_safetensors

    if target.suffix not in (".safetensors", ".net"):
        raise ArgumentError(f"{target}: end its name in .safetensors or .net")
    tensors = read(file)
    if target.suffix == ".net":
        inputs.save_net(tensors, target)
    elif coded:
        save_safetensors(tensors, target)
    else:
        inputs.save_safetensors(tensors, target)
    print(f"{target}: {len(tensors)} tensors")
    if changes := _changes(file):
        print(
            f"{target} holds the tensors alone, and {file} is of a network whose modules were "
            f"changed ({', '.join(records.shown(r) for r in changes)}): the float network with "
            "these tensors computes something else; gossamer.load(FILE, network) makes the changes",
            file=sys.stderr,
        )


def _changes(file: Path) -> list[Any]:
    """The changes to modules that a packed file tells of."""
    from gossamer.compression import records

    with contextlib.suppress(FormatError):  # the writer's own metadata of that name
        return records.recorded(file)
    return []


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A .gsm file.")], as_json: AsJson = False
) -> None:
    """What a packed file holds, tensor by tensor, and where its bytes go."""
    from gossamer.compression import records
    from gossamer.pack import Archive, describe

    with Archive(file) as archive:
        rows, parts = describe(archive), archive.parts()
        size, dense, metadata = archive.file_bytes, archive.dense_bytes, archive.metadata
    changes = _changes(file)
    if as_json:
        figures = {"file_bytes": size, "dense_bytes": dense, "parts": parts, "tensors": rows}
        print(json.dumps({**figures, "metadata": metadata}))
        return
    head = ["tensor", "shape", "density", "values", "codec", "bytes", "bits/weight"]
    cells = [
        [
            shown(row["name"]),
            "x".join(map(str, row["shape"])) or "scalar",
            f"{row['density']:.4f}",
            f"{row['distinct']:,}",
            row["codec"] if row["tied_to"] is None else f"tied to {shown(row['tied_to'])}",
            f"{row['bytes']:,}",
            f"{row['bits_per_weight']:.3f}",
        ]
        for row in rows
    ]
    print("\n".join(columns([head, *cells], (0, 4))))
    print(f"{size:,} bytes for {dense:,}: {smaller(dense, size)}")
    print(", ".join(f"{name} {count:,}" for name, count in parts.items()))
    for record in changes:
        print(f"changed modules: {records.shown(record)}")
