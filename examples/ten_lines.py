"""A trained network made small, in ten lines."""

import sys

from own_model import data, model

import gossamer

out = sys.argv[1] if len(sys.argv) > 1 else "runs/ten-lines"
net = model()  # your own, trained
result = gossamer.compress(net, data(), recipe="deep-compression", out=out)
print(f"{result.ratio:.1f}x smaller: {result.file}")
print(f"accuracy {result.accuracy_before:.4f} -> {result.accuracy_after:.4f}, {result.report}")
small = gossamer.load(result.file, net)  # into the same class, weights from the file
print(f"{gossamer.evaluate(small, data().test).accuracy:.4f} with the weights of the file")
