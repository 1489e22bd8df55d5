"""Before a trainer is imported: what looks like a package of its kind, and is none, is hidden."""

import sys
from importlib.util import find_spec

import no_torchvision

no_torchvision.hide()
# tests/ is on the path, and its folder of that name passes for Hugging Face's package
if "datasets" not in sys.modules and (spec := find_spec("datasets")) and spec.origin is None:
    sys.modules["datasets"] = None  # type: ignore[assignment]
