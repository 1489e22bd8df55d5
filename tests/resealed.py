"""A plan's file with another header, sealed again."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any


def resealed(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with its header changed, and a digest that fits."""
    (length,) = struct.unpack_from("<Q", data, 8)
    header = json.loads(data[16 : 16 + length])
    change(header)
    text = json.dumps(header).encode()
    start = data[:8] + struct.pack("<Q", len(text)) + text
    end = 16 + length
    body = start + bytes(-len(start) % 64) + data[end + -end % 64 : -32]
    return body + hashlib.sha256(body).digest()
