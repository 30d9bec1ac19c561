"""Run: pytest tests/infra/test_fingerprint.py"""

import enum
import hashlib
import json
import math
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdgdm.infra.fingerprint import canonical_json, fingerprint, sha256_hex

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def shuffled(value):
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(plain)
def test_the_order_of_keys_does_not_matter_and_nothing_is_lost(value):
    assert canonical_json(shuffled(value)) == canonical_json(value)
    assert json.loads(canonical_json(value)) == value
    assert canonical_json(value).isascii()


@given(plain, plain)
def test_equal_text_means_equal_values(one, other):
    if canonical_json(one) == canonical_json(other):
        assert json.dumps(shuffled(one), sort_keys=True) == json.dumps(other, sort_keys=True)


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        {1, 2},
        b"x",
        Path("x"),
        date(2026, 1, 1),
        object(),
        {1: 2},
        {None: 2},
        {True: 1},
        Colour.RED,
    ],
    ids=repr,
)
def test_what_has_no_stable_form_is_refused_with_its_place(value):
    with pytest.raises(TypeError, match=r"value\.spec\[1\]\.deep"):
        canonical_json({"spec": [0, {"deep": value}]})


def test_a_fingerprint_is_the_same_in_another_process():
    value = {"b": [1, 2.5, "é"], "a": {"z": None, "y": True}}
    code = f"from bitdgdm.infra.fingerprint import fingerprint; print(fingerprint({value!r}))"
    root = Path(__file__).resolve().parents[2]
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == fingerprint(value)
    text = '{"a":{"y":true,"z":null},"b":[1,2.5,"\\u00e9"]}'
    assert fingerprint(value) == hashlib.sha256(text.encode()).hexdigest() == sha256_hex(text.encode())
