"""``gossamer bench exchange``: seconds, bytes and processor time of a step's gradient exchange."""

from gossamer.distribute.bench.hooks import HOOKS
from gossamer.distribute.bench.runner import ALEXNET, bench, table

__all__ = ["ALEXNET", "HOOKS", "bench", "table"]
