"""Submitted weights: safetensors bytes from an untrusted process, checked before anything else reads them."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np

from hotloop.harness.errors import TrialError

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
# Bounds on what is read before anything is known of it. A model of a thousand layers has a header of a megabyte.
_HEADER_BYTES = 4 << 20
_WHOLE = ("I64", "I32", "I16", "I8", "U8", "BOOL")  # no training changes these: they are no parameters
_DIGITS = 19  # of a number; the largest file offset has as many
_RANK = 16


def check_weights(data: bytearray, spare_bytes: int | None = None) -> int:
    """Check the form and that every number is finite; returns the count of elements (parameters).

    The time that this takes grows with the bytes alone, whatever they say.

    Args:
        spare_bytes: that whole numbers may take, which no training changes; None for any.

    Raises:
        TrialError: `invalid` for bytes that are not well-formed safetensors, or too many whole numbers; `nan` for a
            number that is not finite.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > min(_HEADER_BYTES, len(data) - 8):
            raise ValueError(f"the header is longer than the file or than {_HEADER_BYTES} bytes")
        header = json.loads(bytes(data[8 : 8 + length]), parse_int=_integer)
        body = memoryview(data)[8 + length :]
        spans = _spans(header, len(body))
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as e:
        raise TrialError("invalid", f"the submitted weights are not well-formed safetensors: {str(e)[:200]}") from None
    whole = sum(end - begin for begin, end, dtype, _ in spans if dtype in _WHOLE)
    if spare_bytes is not None and whole > spare_bytes:
        raise TrialError(
            "invalid", f"the submitted weights have {whole:,} bytes of whole numbers; {spare_bytes:,} are allowed"
        )
    for begin, end, dtype, name in spans:
        if not _finite(body[begin:end], dtype):
            raise TrialError("nan", f"the submitted weights have a number in {name} that is not finite")
    return sum((end - begin) // _ITEM_BYTES[dtype] for begin, end, dtype, _ in spans)


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _spans(header: dict[str, Any], size: int) -> list[tuple[int, int, str, str]]:
    """(begin, end, type, name) of each tensor, in the order of the file; they fill it, and none overlaps another."""
    spans = []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        name = ascii(key[:100])
        dtype, shape = entry["dtype"], entry["shape"]
        begin, end = entry["data_offsets"]
        if dtype not in _ITEM_BYTES:
            raise ValueError(f"{name} has the type {ascii(dtype)[:40]}")
        if len(shape) > _RANK or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError(f"{name} has a malformed shape")
        if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
            raise ValueError(f"{name} does not have the size of its shape")
        spans.append((begin, end, dtype, name))
    position = 0
    for begin, end, _, _ in sorted(spans):
        if begin != position:
            raise ValueError("tensors overlap or leave a gap")
        position = end
    if position != size:
        raise ValueError("the file is longer or shorter than its tensors")
    if not spans:
        raise ValueError("no tensor")
    return spans


def _finite(data: memoryview, dtype: str) -> bool:
    if dtype == "BF16":  # numpy has no bfloat16: not finite is an exponent of all ones
        bits = np.frombuffer(data, dtype=np.uint16)
        return not bool(np.any((bits & 0x7F80) == 0x7F80))
    if dtype in ("F64", "F32", "F16"):
        return bool(np.isfinite(np.frombuffer(data, dtype=f"<f{_ITEM_BYTES[dtype]}")).all())
    return True
