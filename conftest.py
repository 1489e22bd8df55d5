"""What pytest leaves out: what cannot be imported here, and what would register itself."""

from importlib.util import find_spec

collect_ignore = ["tests/contracts/toys"]
if not find_spec("triton"):
    collect_ignore.append("src/gossamer/distribute/codecs/triton_kernels.py")
