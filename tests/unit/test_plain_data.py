"""What a file says becomes data of the types that were declared, or a reason in words."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_sparse.claims import claimed_zeros
from tvm_sparse.errors import SparseError
from tvm_sparse.plain_data import build, parse_json


@dataclass(frozen=True)
class Inner:
    kind: Literal["a", "b"]
    size: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Outer:
    name: str
    share: float
    count: int | None
    flag: bool = False
    parts: tuple[Inner, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


whole = st.integers(-(2**62), 2**62)
outers = st.builds(
    Outer,
    name=st.text(),
    share=st.floats(allow_nan=False) | whole,
    count=st.none() | whole,
    flag=st.booleans(),
    parts=st.lists(
        st.builds(Inner, st.sampled_from(["a", "b"]), st.tuples(whole, whole)), max_size=3
    ).map(tuple),
    more=st.dictionaries(st.text(), st.lists(whole, max_size=2), max_size=2),
)


@given(outers)
def test_what_is_written_is_built(outer: Outer) -> None:
    assert build(Outer, parse_json(json.dumps(asdict(outer)))) == outer


PLAIN = {"name": "n", "share": 0.5, "count": 3}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": 3}, "3 is no value of the field 'name'"),
        ({"share": "0.5"}, "\"0.5\" is no value of the field 'share'"),
        ({"share": True}, "true is no value of the field 'share'"),
        ({"share": 10**400}, "a very large number is no value of the field 'share'"),
        ({"count": 0.5}, "0.5 is no value of the field 'count'"),
        ({"count": True}, "true is no value of the field 'count'"),
        ({"count": 2**63}, "is no value of the field 'count'"),
        ({"flag": 1}, "1 is no value of the field 'flag'"),
        ({"parts": {}}, "a dict is no value of the field 'parts'"),
        ({"parts": [{"kind": "c"}]}, "\"c\" is no value of the field 'kind'"),
        ({"parts": [{"kind": "a", "size": [1]}]}, "a list is no value of the field 'size'"),
        ({"parts": [3]}, "3 stands where an object should"),
        ({"more": []}, "a list is no value of the field 'more'"),
        ({"extra": 1}, "there is no field 'extra'"),
    ],
)
def test_what_is_of_another_kind_is_refused(change: dict[str, Any], words: str) -> None:
    build(Outer, PLAIN)
    with pytest.raises(ValueError, match=words):
        build(Outer, {**PLAIN, **change})


def test_a_field_without_a_default_has_to_be_there() -> None:
    with pytest.raises(ValueError, match="the field 'name' is missing"):
        build(Outer, {"share": 1, "count": None})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1"),
        (b"\xff\xfe\xfd", "not UTF-8"),
        ("[" * 10**5 + "]" * 10**5, "nested too deeply"),
        ("[" * 101 + "]" * 101, "nested too deeply"),
        ('{"a": ' * 101 + "1" + "}" * 101, "nested too deeply"),
        ("1" * 10**5, "too many digits"),
        (r'["\ud800"]', "not UTF-8"),
        (r'{"\uDC00": 1}', "not UTF-8"),
        ('["\ud800"]', "not UTF-8"),
    ],
)
def test_what_is_no_usable_json_is_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_pairs_of_escapes_and_a_hundred_brackets_are_usable() -> None:
    assert parse_json(r'"\ud83d\ude00"') == "\U0001f600"
    parse_json("[" * 100 + "]" * 100)


@given(st.text(st.characters(), max_size=2000))
def test_a_message_is_one_printable_line(text: str) -> None:
    said = str(SparseError(text))
    assert said.isprintable() and len(said) < 500
    assert str(SparseError(said)) == said


def test_of_a_long_message_the_first_and_the_last_words_stay() -> None:
    said = str(SparseError(f"layer 'a' {'b' * 10**6} cannot be packed"))
    assert said.startswith("layer 'a' bbb") and said.endswith("bbb cannot be packed")
    said = str(SparseError("the function fails:\n  one\n  two\n  three\nbecause of four"))
    assert said == "the function fails: ... because of four"


def test_claims_are_kept_or_refused() -> None:
    np.testing.assert_array_equal(claimed_zeros((2, 0, 3), "float32"), np.zeros((2, 0, 3)))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for shape in ((2**60,), (2**32, 2**32), (pages // 4 + 1,), (0, 2**62), (2**70,)):
        with pytest.raises(ValueError, match="more than this machine's memory"):
            claimed_zeros(shape, "float32")
    with pytest.raises(ValueError, match="negative"):
        claimed_zeros((-1, 4), "float32")
