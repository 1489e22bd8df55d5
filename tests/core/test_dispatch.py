"""What watches a network's operations leaves the compiler alone."""

import launched

COUNTED = """
import sys, torch
from gossamer.core.flops import count
assert count(torch.nn.Linear(3, 2), torch.zeros(1, 3)).macs == 6
print("torch._dynamo" in sys.modules)
"""


def test_counting_products_does_not_import_the_compiler() -> None:
    assert launched.run("-c", COUNTED).strip() == "False"
