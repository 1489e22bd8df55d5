"""Sparse, ternary and shared weights executed as they are, on a CPU: numpy in, numpy out, no torch.

Every kernel has a packed form (a frozen dataclass that cannot hold a bad value), a function that
packs a dense numpy weight into it, and a call. The compiled module does the work where it was built
(``native/``); with ``GOSSAMER_NATIVE=0``, or where it was not, a numpy twin gives the same answer:
the same bits where sums are integers, equal to rounding where they are floats.

==================  ==============================================================================
:mod:`.conv`        float32 sparse convolution and small-batch linear layers
:mod:`.conv_int8`   the same on 8-bit activations, requantized as sums leave the kernel
:mod:`.gemv`        float32 sparse linear layer, one sample
:mod:`.gemv_int8`   8-bit sparse linear layer by byte permutes
:mod:`.few_bits`    2-bit ternary and 4-bit code-book linear layers
:mod:`.row_books`   2- and 4-bit linear layers, each row with values of its own, float32 activations
:mod:`.eight_bits`  8-bit activations: scales, zero points, quads of channels
==================  ==============================================================================

Activations of integer kernels are **seven bits** (0 to 127 around a zero point): processors without
VNNI multiply bytes in pairs that saturate at 16 bits, which seven bits cannot reach, so that every
processor gives the same bits.
"""
