"""Streamed text against the full decode, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from ponderttt.engine.detokenizer import IncrementalDetokenizer
from ponderttt.models.tokenizer import Tokenizer
from tests.helpers import CHAT_SPECIALS

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=300)
# Few letters, so that stop strings occur, overlap and nearly occur.
STOPS = st.lists(st.text("ab\n é😀", min_size=1, max_size=4), max_size=4)
ASTRONAUT = "def f(): return '👩‍🚀 naïve 漢字'\n"


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(tiny_llama_dir)


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(smollm2_dir)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per byte of the text."""
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return [by_bytes[bytes([byte])] for byte in text.encode()]


def cut(full: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first (of several, the longest)."""
    for end in range(len(full) + 1):
        ending = [len(stop) for stop in stops if full[:end].endswith(stop)]
        if ending:
            return full[: end - max(ending)]
    return full


def first_bytes(pieces: list[bytes]) -> list[int]:
    """Per piece, the index of the character that has its first byte, in the text of all pieces."""
    data = b"".join(pieces)
    owner: list[int] = []
    while len(owner) < len(data):
        rest = data[len(owner) :]
        try:
            width = len(rest.decode()[0].encode())
        except UnicodeDecodeError as error:
            valid = rest[: error.start].decode()
            width = len(valid[0].encode()) if valid else error.end
        owner += [owner[-1] + 1 if owner else 0] * width
    starts = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    return [owner[start] for start in starts]


def assert_streams(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> None:
    full = tokenizer.decode(ids, skip_special_tokens=True)
    expected = cut(full, stops)
    stream = IncrementalDetokenizer(tokenizer, stops)
    seen = ""
    for token in ids:
        stopped_before = stream.stopped
        new = stream.push(token)
        assert not (stopped_before and new)
        seen += new
        # So no character of a stop string is ever seen.
        assert expected.startswith(seen)
        assert stream.text == seen
    seen += stream.flush()
    assert seen == stream.text == expected
    assert stream.stopped == (expected != full)
    assert len(stream.offsets) == len(ids)
    assert stream.offsets == sorted(stream.offsets)


@REPEATABLE
@given(text=st.text(max_size=60), stops=STOPS)
def test_stream_of_any_text_equals_the_full_decode(
    tiny: Tokenizer, text: str, stops: list[str]
) -> None:
    assert_streams(tiny, encode(tiny, text), stops)


@REPEATABLE
@given(text=st.text("ab\n é😀", max_size=40), stops=STOPS)
def test_stream_of_text_with_stop_strings_equals_the_cut_decode(
    tiny: Tokenizer, text: str, stops: list[str]
) -> None:
    assert_streams(tiny, encode(tiny, text), stops)
    assert_streams(tiny, spell(tiny, text), stops)


@REPEATABLE
@given(text=st.text("ab", max_size=60), stop=st.text("ab", min_size=4, max_size=8))
@example(text="aabaaabaaaa", stop="aabaaaa")  # "aabaaa" has to fall back twice
def test_stream_of_a_stop_string_that_repeats_itself_finds_it(
    tiny: Tokenizer, text: str, stop: str
) -> None:
    assert_streams(tiny, spell(tiny, text + stop[:-1] + stop), [stop])


@REPEATABLE
@given(data=st.data(), stops=STOPS)
def test_stream_of_any_tokens_equals_the_full_decode(
    tiny: Tokenizer, data: st.DataObject, stops: list[str]
) -> None:
    # Two ids beyond the vocabulary too: a model's output may be padded.
    ids = data.draw(st.lists(st.integers(0, tiny.vocab_size + 1), max_size=40))
    assert_streams(tiny, ids, stops)


@REPEATABLE
@given(broken=st.binary(max_size=40))
def test_stream_of_any_bytes_equals_the_full_decode(tiny: Tokenizer, broken: bytes) -> None:
    by_bytes = {tiny.token_bytes(i): i for i in range(tiny.vocab_size)}
    assert_streams(tiny, [by_bytes[bytes([byte])] for byte in broken], ["\ufffd\ufffd"])


@REPEATABLE
@given(data=st.data())
def test_offsets_of_any_tokens_point_at_their_first_byte(
    tiny: Tokenizer, data: st.DataObject
) -> None:
    special = len(CHAT_SPECIALS)
    ids = data.draw(st.lists(st.integers(special, tiny.vocab_size - 1), max_size=40))
    stream = IncrementalDetokenizer(tiny)
    for token in ids:
        stream.push(token)
    assert stream.offsets == first_bytes([tiny.token_bytes(token) for token in ids])


def test_push_of_plain_text_emits_every_token_at_once(tiny: Tokenizer) -> None:
    ids = encode(tiny, "def parse(self, argument):\n    return self.value\n")
    stream = IncrementalDetokenizer(tiny, ["###"])
    pieces = [tiny.decode([token]) for token in ids]
    assert [stream.push(token) for token in ids] == pieces
    assert stream.offsets == [len("".join(pieces[:i])) for i in range(len(ids))]
    assert not stream.stopped
    assert stream.flush() == ""


def test_push_of_a_split_character_holds_it_until_it_is_whole(tiny: Tokenizer) -> None:
    stream = IncrementalDetokenizer(tiny)
    ids = spell(tiny, "a😀b")
    assert [stream.push(token) for token in ids] == ["a", "", "", "", "😀", "b"]
    assert stream.offsets == [0, 1, 1, 1, 1, 2]


def test_push_after_an_unfinished_character_begins_a_new_one(tiny: Tokenizer) -> None:
    stream = IncrementalDetokenizer(tiny)
    start, follow = spell(tiny, "😀")[:2], spell(tiny, "a")
    assert [stream.push(token) for token in start + follow] == ["", "", "\ufffda"]
    assert stream.offsets == [0, 0, 1]


def test_flush_of_an_unfinished_character_gives_the_replacement_character(
    tiny: Tokenizer,
) -> None:
    stream = IncrementalDetokenizer(tiny)
    for token in spell(tiny, "a😀")[:-1]:
        stream.push(token)
    assert stream.text == "a"
    assert stream.flush() == "\ufffd"
    assert stream.text == "a\ufffd"
    assert stream.flush() == ""


def test_push_holds_the_beginning_of_a_stop_string_and_releases_it(tiny: Tokenizer) -> None:
    stream = IncrementalDetokenizer(tiny, ["aab"])
    assert [stream.push(token) for token in spell(tiny, "aaac")] == ["", "", "a", "aac"]
    assert [stream.push(token) for token in spell(tiny, "aa")] == ["", ""]
    assert stream.flush() == "aa"
    assert not stream.stopped


def test_stop_string_over_several_tokens_ends_the_text_before_it(tiny: Tokenizer) -> None:
    stream = IncrementalDetokenizer(tiny, ["\n\n"])
    pushed = [stream.push(token) for token in spell(tiny, "x\n\ny")]
    assert pushed == ["x", "", "", ""]
    assert stream.stopped
    assert (stream.flush(), stream.text) == ("", "x")
    assert stream.offsets == [0, 1, 2, 3]


def test_stop_string_within_one_token_ends_the_text_before_it(tiny: Tokenizer) -> None:
    ids = encode(tiny, " return")
    assert len(ids) == 1
    stream = IncrementalDetokenizer(tiny, ["tur"])
    assert stream.push(ids[0]) == " re"
    assert stream.stopped


def test_stop_string_at_the_very_start_leaves_no_text(tiny: Tokenizer) -> None:
    stream = IncrementalDetokenizer(tiny, ["def"])
    assert [stream.push(token) for token in spell(tiny, "def f")] == [""] * 5
    assert stream.stopped
    assert stream.flush() == stream.text == ""


@pytest.mark.parametrize("stops", [["class", "def"], ["def", "class"], ["if", "class", "def"]])
def test_stop_strings_of_which_one_comes_earlier_end_the_text_there(
    tiny: Tokenizer, stops: list[str]
) -> None:
    stream = IncrementalDetokenizer(tiny, stops)
    for token in encode(tiny, "x = 1\ndef f():\n    pass\nclass A:\n    if x:"):
        stream.push(token)
    assert stream.text + stream.flush() == "x = 1\n"


@pytest.mark.parametrize("split", [True, False])
def test_stop_strings_that_overlap_give_one_text_however_it_is_tokenised(
    tiny: Tokenizer, split: bool
) -> None:
    # "tu" is complete before "return", though it begins later.
    stream = IncrementalDetokenizer(tiny, ["return", "tu"])
    for token in spell(tiny, "return") if split else encode(tiny, "return"):
        stream.push(token)
    assert stream.text == "re"


def test_special_tokens_have_no_text(tiny: Tokenizer) -> None:
    end = encode(tiny, "<|endoftext|>")
    assert len(end) == 1
    stream = IncrementalDetokenizer(tiny, ["<|endoftext|>"])
    smile = spell(tiny, "😀")
    pushed = [stream.push(token) for token in smile[:2] + end + smile[2:] + end]
    assert pushed == ["", "", "", "", "😀", ""]
    assert not stream.stopped
    assert stream.flush() == ""


def test_empty_stop_string_is_refused(tiny: Tokenizer) -> None:
    with pytest.raises(ValueError, match="empty"):
        IncrementalDetokenizer(tiny, ["a", ""])


def test_push_of_endless_broken_bytes_holds_at_most_one_character(tiny: Tokenizer) -> None:
    lead = spell(tiny, "😀")[0]
    stream = IncrementalDetokenizer(tiny)
    assert [stream.push(lead) for _ in range(2000)] == ["", *["\ufffd"] * 1999]


def test_stream_with_sentencepiece_keeps_spaces_and_joins_bytes() -> None:
    spellings = ["</s>", "▁", "▁hi", "there", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    raw = RawTokenizer(models.WordLevel({text: i for i, text in enumerate(spellings)}, "</s>"))
    raw.add_special_tokens(["</s>"])
    # Llama's decoder: it strips the space of the first token, so a lone one decodes to nothing.
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    llama = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>"))
    ids = [2, 1, 3, 4, 5, 6, 7, 0]
    assert llama.decode([1]) == ""
    stream = IncrementalDetokenizer(llama)
    pushed = [stream.push(token) for token in ids]
    # The first space stays: a completion goes on after a prompt.
    assert pushed == [" hi", " ", "there", "", "", "", "😀", ""]
    assert "".join(pushed) == " " + llama.decode(ids, skip_special_tokens=True)


@pytest.mark.real_model
@settings(derandomize=True, deadline=None, max_examples=50)
@given(data=st.data(), stops=STOPS)
def test_stream_with_an_embedded_model_equals_the_full_decode(
    smollm2: Tokenizer, data: st.DataObject, stops: list[str]
) -> None:
    ids = st.lists(st.integers(0, smollm2.vocab_size - 1), max_size=60)
    text = st.text(max_size=60).map(lambda text: encode(smollm2, text))
    assert_streams(smollm2, data.draw(st.one_of(ids, text)), stops)


@pytest.mark.real_model
def test_emoji_with_an_embedded_model_come_out_whole(smollm2: Tokenizer) -> None:
    ids = encode(smollm2, ASTRONAUT)
    stream = IncrementalDetokenizer(smollm2)
    pushed = [stream.push(token) for token in ids]
    assert "" in pushed
    assert "\ufffd" not in "".join(pushed)
    assert "".join(pushed) + stream.flush() == ASTRONAUT
