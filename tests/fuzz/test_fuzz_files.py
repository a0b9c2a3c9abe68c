"""Whatever a file holds, reading it works or is refused in a sentence: no crash, no hang."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fuzz_mutations import Files
from fuzz_parsers import PARSERS
from fuzz_reader import Reader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("safetensors", reason="needs safetensors")

# Of the long form, for each parser.
LONG_EXAMPLES = int(os.environ.get("TVM_SPARSE_FUZZ_EXAMPLES", "2000"))

checks = list(HealthCheck)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    running = Reader(tmp_path_factory.mktemp("fuzz"))
    yield running
    running.close()


@pytest.mark.parametrize("name", PARSERS)
def test_what_is_whole_is_read(reader: Reader, name: str) -> None:
    answers = [reader.read(name, files) for files in PARSERS[name].seeds()]
    assert all(answer["verdict"] in ("read", "refused") for answer in answers), answers
    assert any(answer["verdict"] == "read" for answer in answers) or name == "library", answers


@pytest.mark.parametrize("name", PARSERS)
def test_what_is_damaged_is_read_or_refused_in_a_sentence(reader: Reader, name: str) -> None:
    profile = settings(
        max_examples=PARSERS[name].examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=checks,
    )
    profile(fuzz(reader, name))()


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_much_more_of_it_is_read_or_refused_too(reader: Reader, name: str) -> None:
    profile = settings(max_examples=LONG_EXAMPLES, deadline=None, suppress_health_check=checks)
    profile(fuzz(reader, name))()


def fuzz(reader: Reader, name: str) -> Callable[[], None]:
    """Make a property of a row of the table."""
    parser = PARSERS[name]
    damaged = st.sampled_from(parser.seeds()).flatmap(parser.damage)

    @given(damaged)
    def reads_or_refuses(files: Files) -> None:
        answer: dict[str, Any] = reader.read(name, files)
        assert answer["verdict"] in ("read", "refused"), f"{answer['verdict']}: {answer['text']}"

    return reads_or_refuses
