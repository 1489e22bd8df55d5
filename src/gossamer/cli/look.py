"""A command on a network: look."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gossamer.cli.options import (
    MODEL,
    AsJson,
    Examples,
    Key,
    Pretrained,
    Shape,
    Weights,
    example,
)
from gossamer.cli.program import app

__all__ = ["look_"]


@app.command("look")
def look_(
    network: Annotated[str, typer.Argument(help=MODEL)],
    weights: Weights = None,
    key: Key = None,
    pretrained: Pretrained = False,
    dataset: Examples = None,
    shape: Shape = None,
    as_json: AsJson = False,
) -> None:
    """A network's layers: what can be pruned, shrunk and quantized, what not, and to how few bytes.

    Bytes at 8, 4 and 2 bits are the entropy of the weights rounded to nearest. With example inputs
    (--data or --shape) the multiplications of each layer stand beside them.
    """
    from gossamer import datasets, nets
    from gossamer.analysis.look import look
    from gossamer.compression import inputs

    data = None if dataset is None else datasets.load(dataset)
    if data is None:
        model = nets.build(network, pretrained=pretrained)
    else:
        model = inputs.network(network, data, pretrained=pretrained)
    if weights is not None:
        model = inputs.load_weights(model, weights, key)
    found = look(model, example=example(data, shape))
    print(json.dumps(found.as_dict()) if as_json else found)
