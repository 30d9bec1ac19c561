"""One text and one hash for equal values, on every machine and in every run.

Guarantees: equal values give equal text; what has no stable form (sets, objects, NaN, non-text keys) is
refused with the place it was found at, never guessed.
Knows nothing of: what is fingerprinted.
"""

import hashlib
import json
import math
from typing import Any


def canonical_json(value: Any) -> str:
    """Return `value` as JSON with sorted keys, no blanks, ASCII only.

    Raises: TypeError for anything but None, bool, int, finite float, str, list, tuple, dict with text keys.
    """
    _check(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON, in hex. Raises: TypeError like canonical_json."""
    return sha256_hex(canonical_json(value).encode())


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _check(value: Any, where: str) -> None:
    if value is None or type(value) in (bool, int, str):
        return
    if type(value) is float:
        if not math.isfinite(value):
            raise TypeError(f"{where} is {value}, which JSON can't hold; use null")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{where} has the key {key!r}, a {type(key).__name__}; keys must be text")
            _check(item, f"{where}.{key}")
    else:
        raise TypeError(
            f"{where} is a {type(value).__name__}, which has no stable form; give plain JSON values"
        )
