"""What pytest leaves out where it cannot be imported."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["src/gossamer/distribute/codecs/triton_kernels.py"]
