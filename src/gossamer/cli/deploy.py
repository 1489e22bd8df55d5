"""Commands that deploy: export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.options import DATASET, MODEL, AsJson, Key, Pretrained, Weights
from gossamer.cli.program import app
from gossamer.core.errors import ArgumentError

if TYPE_CHECKING:
    from torch import nn

    from gossamer.datasets import Dataset

__all__ = ["example", "export_", "subject"]

SUBJECT = f"A .gsm file of a run, or: {MODEL}"
_OF_FILE = "Of a .gsm file: the network that it is of; left out: what run.json beside it says."
Given = Annotated[str | None, typer.Option("--model", "-m", help=_OF_FILE)]
Examples = Annotated[
    str | None, typer.Option("--dataset", "--data", "-d", help=f"Example inputs: {DATASET}")
]
Shape = Annotated[
    str | None,
    typer.Option(help="Of one random example where there is no data, without batch: 3,32,32."),
]


@app.command("export")
def export_(
    network: Annotated[str, typer.Argument(help=SUBJECT)],
    to: Annotated[Path, typer.Option("--to", help="The .onnx, .xml or .pte file to write.")],
    dataset: Examples = None,
    shape: Shape = None,
    int8: Annotated[bool, typer.Option("--int8", help="Eight bits, calibrated on --data.")] = False,
    int8_weights: Annotated[
        str, typer.Option(help="int7 (fast everywhere), uint8 (exact grids of 8 bits) or auto.")
    ] = "auto",
    floor: Annotated[
        float, typer.Option(min=0, max=1, help="The least cosine of int8 outputs with torch's.")
    ] = 0.98,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    model: Given = None,
    weights: Weights = None,
    key: Key = None,
    pretrained: Pretrained = False,
    as_json: AsJson = False,
) -> None:
    """Write a network for onnxruntime, OpenVINO or ExecuTorch.

    The file is run there and compared with torch before it is written: float32 to 1e-4 of the
    largest output, int8 to the floor; else nothing is written.
    """
    from dataclasses import asdict

    from gossamer.runtime.export import export

    found, data = subject(network, model, weights, key, pretrained, dataset)
    made = export(
        found,
        example(data, shape),
        to,
        precision="int8" if int8 else "float32",
        calibration=data.train if int8 and data is not None else None,
        weights=int8_weights,  # type: ignore[arg-type]  # checked there
        floor=floor,
        overwrite=overwrite,
    )
    print(json.dumps(asdict(made), default=str) if as_json else made)


def subject(
    network: str,
    model: str | None,
    weights: Path | None,
    key: str | None,
    pretrained: bool,
    dataset: str | None,
) -> tuple[nn.Module, Dataset | None]:
    """The network that is meant, in the shape of the data where there are any."""
    from gossamer import datasets, nets
    from gossamer.compression import inputs

    if Path(network).suffix == ".gsm":
        if weights is not None:
            raise ArgumentError(f"{network} is a file of weights: leave --weights {weights} out")
        weights = Path(network)
        known = _beside(weights)
        given, dataset = model or known.get("model"), dataset or known.get("dataset")
        if given is None:
            raise ArgumentError(
                f"{network} holds tensors; say of which network they are: --model NAME"
            )
        network = given
    elif model is not None:
        raise ArgumentError(f"network {network!r} and --model {model!r}: give one of them")
    data = None if dataset is None else datasets.load(dataset)
    if data is not None:
        built = inputs.network(network, data, pretrained=pretrained, weights=weights, key=key)
        return built, data
    built = nets.build(network, pretrained=pretrained)
    return (built if weights is None else inputs.load_weights(built, weights, key)), None


def _beside(file: Path) -> dict[str, Any]:
    """Network and data that the run.json beside a file names; only those that run no code."""
    from gossamer import datasets, nets

    try:
        run = json.loads((file.parent / "run.json").read_text())
        found = {key: run[key] for key in ("model", "dataset") if isinstance(run[key], str)}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    own = {"model": nets.is_own, "dataset": lambda name: name not in datasets.DATASETS}
    return {key: value for key, value in found.items() if not own[key](value)}


def example(data: Dataset | None, shape: str | None, count: int = 2) -> Any:
    """Example inputs: of the data, or random ones of a shape; None for neither."""
    import torch

    if shape is None:
        return None if data is None else data.test.batch(slice(0, count))[0]
    try:
        sizes = [int(part) for part in shape.replace("x", ",").split(",")]
        return torch.randn(count, *sizes, generator=torch.Generator().manual_seed(0))
    except (ValueError, RuntimeError) as e:
        raise ArgumentError(f"--shape {shape!r} is no shape of an example, such as 3,32,32") from e
