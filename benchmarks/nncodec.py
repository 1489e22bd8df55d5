"""Pretrained ResNets through NNCodec, the NNR standard's coder, over its quantizer's settings.

Run: python benchmarks/nncodec.py --python VENV/bin/python [--work DIR] [--json FILE]

VENV has the package `nncodec`, which needs numpy < 2 and therefore an interpreter of its own. Its
best settings without data: dependent quantization, batch-norm folded, parameters that are no
weights at qp -40. A lower qp is a finer step: four of them halve it. Accuracy is that of the
decoded network on the first 2,000 test images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from record import record
from torch import nn

from gossamer import datasets, nets
from gossamer.datasets import Split
from gossamer.training import evaluate

DEPTHS = (20, 32, 44, 56)
QPS = (-14, -16, -18, -20, -22, -24)
IMAGES = 2000

# Runs in the other interpreter: a state dict in, decoded tensors and their bytes out. torchvision
# is imported by the package but not used; one for another torch lacks two operators.
CODE = """
import importlib.metadata, json, sys, torch
from torch import nn
from torch.nn import functional as F
torch.set_num_threads(1)
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    try:
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        pass
import nncodec.nn as coder

class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.more = outputs - inputs
    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(x + y)

class Net(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inputs = 16
        for stage, outputs in enumerate((16, 32, 64), 1):
            layer = []
            for i in range(blocks):
                layer.append(Block(inputs, outputs, 2 if stage > 1 and i == 0 else 1))
                inputs = outputs
            setattr(self, f"layer{stage}", nn.Sequential(*layer))
        self.linear = nn.Linear(64, 10)
    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x)
        return self.linear(x.mean((2, 3)))

work, depth, qps = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
model = Net((depth - 2) // 6).eval()
model.load_state_dict(torch.load(f"{work}/resnet-{depth}.pt"))
sizes = {}
for qp in qps:
    args = dict(qp=qp, nonweight_qp=-40, bnf=True, use_dq=True, ioq=False, verbose=False,
                results=work)
    coded = coder.encode(model, args)
    decoded = coder.decode(coded, args)
    torch.save({k: torch.from_numpy(v) for k, v in decoded.items()},
               f"{work}/resnet-{depth}-{qp}.pt")
    sizes[qp] = len(coded)
versions = {p: importlib.metadata.version(p) for p in ("nncodec", "numpy", "torch")}
print(json.dumps({"bytes": sizes, "versions": versions}))
"""


def decoded(depth: int, path: Path) -> nn.Module:
    """The network with NNCodec's tensors: its batch-norm is a factor and a shift."""
    model = nets.build(f"resnet-{depth}")
    own = model.state_dict()
    for name, value in torch.load(path).items():
        at = name.removesuffix("_scaling").removesuffix(".bias")
        norm = at.removesuffix(".weight").replace("conv", "bn")
        if name in own:
            own[name] = value
        elif name.endswith("_scaling"):
            own[f"{norm}.weight"] = value
            own[f"{norm}.running_mean"].zero_()
            own[f"{norm}.running_var"].fill_(1 - 1e-5)  # batch-norm adds the 1e-5
        elif name.endswith(".weight.bias"):
            own[f"{norm}.bias"] = value
        else:
            raise SystemExit(f"NNCodec gave a tensor {name} that the network has no place for")
    model.load_state_dict(own)
    return model


def rows(some: Split, depth: int, work: Path, python: Path) -> dict[str, Any]:
    """One network over all settings; what has been measured is read from ``work``."""
    path = work / f"resnet-{depth}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    model = nets.build(f"resnet-{depth}", pretrained=True)
    torch.save(model.state_dict(), work / f"resnet-{depth}.pt")
    code = [str(python), "-c", CODE, str(work), str(depth), json.dumps(QPS)]
    made = json.loads(
        subprocess.run(code, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    table = [{"qp": None, "bytes": None, "accuracy": 100 * evaluate(model, some).accuracy}]
    for qp in QPS:
        accuracy = evaluate(decoded(depth, work / f"resnet-{depth}-{qp}.pt"), some).accuracy
        table.append({"qp": qp, "bytes": made["bytes"][str(qp)], "accuracy": 100 * accuracy})
        print(depth, table[-1], flush=True)
    found = {"rows": table, "versions": made["versions"]}
    path.write_text(json.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, required=True, help="interpreter with nncodec")
    parser.add_argument("--work", type=Path, default=Path("runs/nncodec"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    began = time.time()
    torch.set_num_threads(1)
    test = datasets.load("cifar10").test
    some = Split(test.stored[:IMAGES], test.targets[:IMAGES], mean=test.mean, std=test.std)
    table = {str(depth): rows(some, depth, args.work.resolve(), args.python) for depth in DEPTHS}
    about = "NNCodec on the pretrained ResNets: bytes and accuracy over its quantizer."
    record("benchmark-nncodec", about, began, [], {"images": IMAGES, "networks": table}, args.json)


if __name__ == "__main__":
    main()
