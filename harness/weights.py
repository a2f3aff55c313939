"""Submitted weights: safetensors bytes from an untrusted process, checked before anything else reads them."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np

from harness.errors import TrialError

__all__ = ["check_weights"]

_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_HEADER_BYTES = 16 << 20


def check_weights(data: bytearray) -> int:
    """Check the form and that every number is finite; returns the count of elements (parameters).

    Raises:
        TrialError: `invalid` for bytes that are not well-formed safetensors, `nan` for a number that is not finite.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > min(_HEADER_BYTES, len(data) - 8):
            raise ValueError("the header is longer than the file")
        header = json.loads(bytes(data[8 : 8 + length]))
        return _check_tensors(header, memoryview(data)[8 + length :])
    except (ValueError, KeyError, TypeError, struct.error, RecursionError) as e:
        raise TrialError("invalid", f"the submitted weights are not well-formed safetensors: {e}") from None


def _check_tensors(header: dict[str, Any], body: memoryview) -> int:
    count = 0
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = entry["dtype"], entry["shape"]
        begin, end = entry["data_offsets"]
        if dtype not in _ITEM_BYTES:
            raise ValueError(f"{name} has the type {dtype}")
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
            raise ValueError(f"{name} has a malformed shape")
        elements = math.prod(shape)
        if end - begin != elements * _ITEM_BYTES[dtype] or end > len(body):
            raise ValueError(f"{name} does not have the size of its shape")
        if not _finite(body[begin:end], dtype):
            raise TrialError("nan", f"the submitted weights have a number in {name} that is not finite")
        spans.append((begin, end))
        count += elements
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError("tensors overlap or leave a gap")
        position = end
    if position != len(body):
        raise ValueError("bytes follow the last tensor")
    if not spans:
        raise ValueError("no tensor")
    return count


def _finite(data: memoryview, dtype: str) -> bool:
    if dtype == "BF16":  # numpy has no bfloat16: not finite is an exponent of all ones
        bits = np.frombuffer(data, dtype=np.uint16)
        return not bool(np.any((bits & 0x7F80) == 0x7F80))
    if dtype in ("F64", "F32", "F16"):
        return bool(np.isfinite(np.frombuffer(data, dtype=f"<f{_ITEM_BYTES[dtype]}")).all())
    return True
