"""Prompts: always the same, of the length asked for, and never twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from ponderttt.bench.texts import Rounds, TextStream, source_files
from ponderttt.errors import UnavailableError
from ponderttt.models.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(tiny_llama_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(tiny_llama_dir)


def test_stream_with_the_same_seed_gives_the_same_prompts(tokenizer: Tokenizer) -> None:
    one, other = (TextStream(tokenizer, "0/row") for _ in range(2))
    assert [one.take(40) for _ in range(3)] == [other.take(40) for _ in range(3)]


def test_stream_with_another_seed_gives_other_prompts(tokenizer: Tokenizer) -> None:
    assert TextStream(tokenizer, "0/row").take(64) != TextStream(tokenizer, "1/row").take(64)


def test_stream_goes_on_where_it_was_whatever_the_lengths(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, "0/row")
    pieces = stream.take(7) + stream.take(50) + stream.take(3)
    assert pieces == TextStream(tokenizer, "0/row").take(60)


def test_rounds_are_the_same_for_all_sides_in_whatever_order(tokenizer: Tokenizer) -> None:
    forwards = Rounds(TextStream(tokenizer, "0/row"), 2, 16)
    first, second = forwards[0], forwards[1]
    assert forwards[0] == first
    assert [len(prompt) for prompt in first] == [16, 16]
    assert Rounds(TextStream(tokenizer, "0/row"), 2, 16)[1] == second
    assert len({*first, *second}) == 4


def test_stream_that_runs_dry_says_so(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, "0", package="sse_starlette")
    with pytest.raises(UnavailableError, match="too little text"):
        stream.take(10_000_000)


@pytest.mark.parametrize("package", ["no_such_package", "textwrap"])
def test_package_without_files_is_refused(package: str) -> None:
    with pytest.raises(UnavailableError, match=package):
        source_files(package)
