"""The tokenizer against transformers, on the real vocabularies."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ponderttt.errors import InvalidRequestError, ModelError
from ponderttt.models.tokenizer import FimTokens, Tokenizer
from tests import helpers

CODE = "def área(r: float) -> float:\n\treturn 3.14159 * r**2  # π·r², 日本語, 🎉👩‍💻\r\n\n"
# smollm2's vocabulary has no token for some bytes, and its tokenizer drops them: six control
# characters, and the first byte of the unassigned planes 4 to 11.
IN_SMOLLM2 = st.characters(
    max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d", codec="utf-8"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does `len` do?"},
    {"role": "assistant", "content": "It counts."},
    {"role": "user", "content": "Ünïcode?\n"},
]


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(smollm2_dir)


@pytest.fixture(scope="module")
def coder(coder_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(coder_dir)


@pytest.mark.real_model
def test_encode_smollm2_equals_transformers_and_decodes_back(
    smollm2: Tokenizer, smollm2_dir: Path
) -> None:
    reference = AutoTokenizer.from_pretrained(smollm2_dir)
    text = CODE + helpers.source_text()
    ids = smollm2.encode(text)
    assert ids == reference(text)["input_ids"]
    assert smollm2.decode(ids) == text


@pytest.mark.real_model
@settings(deadline=None, max_examples=200)
@given(text=st.text(IN_SMOLLM2))
def test_encode_any_unicode_round_trips_and_token_bytes_spell_it(
    smollm2: Tokenizer, text: str
) -> None:
    ids = smollm2.encode(text)
    assert smollm2.decode(ids) == text
    assert b"".join(map(smollm2.token_bytes, ids)) == text.encode()


@pytest.mark.real_model
@settings(deadline=None, max_examples=100)
@given(text=st.text())
def test_token_bytes_of_the_coder_spell_the_text_it_normalises(coder: Tokenizer, text: str) -> None:
    ids = coder.encode(text)
    assert b"".join(map(coder.token_bytes, ids)) == unicodedata.normalize("NFC", text).encode()


@pytest.mark.real_model
def test_token_bytes_with_special_tokens_spell_the_text(coder: Tokenizer) -> None:
    text = f"<|im_start|>user\n{CODE}<|im_end|>\n<|fim_prefix|>"
    ids = coder.encode(text)
    assert 151644 in ids
    assert b"".join(map(coder.token_bytes, ids)) == text.encode()


def test_token_bytes_without_a_token_are_empty(tiny_llama_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(tiny_llama_dir)
    beyond = tokenizer.vocab_size
    assert [tokenizer.token_bytes(i) for i in (-1, beyond, 1 << 31, 10**30)] == [b""] * 4


@pytest.mark.real_model
@pytest.mark.parametrize("which", ["smollm2_dir", "coder_dir"])
@pytest.mark.parametrize("open_answer", [True, False])
def test_chat_template_equals_transformers(
    which: str, open_answer: bool, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(which)
    reference = AutoTokenizer.from_pretrained(directory)
    expected = reference.apply_chat_template(
        CHAT, add_generation_prompt=open_answer, return_dict=False
    )
    tokenizer = Tokenizer.from_dir(directory)
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=open_answer)
    assert type(ids) is list
    assert ids == expected
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n") == open_answer


def test_chat_template_without_one_names_the_field(tiny_llama_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (directory / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.from_dir(directory)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        tokenizer.apply_chat_template(CHAT)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{{ messages[0].x.y }}"]
)
def test_chat_template_that_refuses_names_the_field(
    template: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(InvalidRequestError, match="chat template refuses") as caught:
        Tokenizer.from_dir(directory).apply_chat_template(CHAT)
    assert caught.value.param == "messages"


def test_encode_with_half_a_surrogate_pair_is_refused(tiny_llama_dir: Path) -> None:
    with pytest.raises(InvalidRequestError, match="character 2 is half a surrogate pair"):
        Tokenizer.from_dir(tiny_llama_dir).encode("ab\ud83d")


@pytest.mark.parametrize("bad", [-1, 1 << 31, 1 << 70])
def test_decode_with_an_impossible_id_names_the_limit(bad: int, tiny_llama_dir: Path) -> None:
    with pytest.raises(InvalidRequestError, match="between 0 and 511"):
        Tokenizer.from_dir(tiny_llama_dir).decode([1, bad])


def test_decode_skips_special_tokens_when_asked(tiny_llama_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(tiny_llama_dir)
    ids = tokenizer.encode("a<|im_end|>b , c")
    assert tokenizer.decode(ids) == "a<|im_end|>b , c"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab , c"


def test_encode_of_a_text_beyond_the_context_stays_quiet(
    tiny_gpt2_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = shutil.copytree(tiny_gpt2_dir, tmp_path / "model")
    settings_path = directory / "tokenizer_config.json"
    limited = json.loads(settings_path.read_text()) | {"model_max_length": 16}
    settings_path.write_text(json.dumps(limited))
    ids = Tokenizer.from_dir(directory).encode(helpers.source_text())
    assert len(ids) > 10_000
    assert caplog.records == []


@pytest.mark.real_model
def test_coder_knows_where_to_stop_and_its_markers(coder: Tokenizer, coder_dir: Path) -> None:
    vocabulary = AutoTokenizer.from_pretrained(coder_dir).get_vocab()
    markers = [vocabulary[f"<|fim_{name}|>"] for name in ("prefix", "suffix", "middle")]
    assert coder.fim == FimTokens(*markers)
    assert coder.eos_token_ids == {vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]}
    assert coder.vocab_size == 151936


@pytest.mark.real_model
def test_encode_fim_on_the_coder_spells_prefix_suffix_middle(coder: Tokenizer) -> None:
    ids = coder.encode_fim("def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n")
    assert coder.decode(ids) == (
        "<|fim_prefix|>def add(a, b):\n    return "
        "<|fim_suffix|>\n\nprint(add(1, 2))\n<|fim_middle|>"
    )
    assert coder.fim is not None
    assert [ids[0], ids[-1]] == [coder.fim.prefix, coder.fim.middle]


@pytest.mark.real_model
def test_encode_fim_without_markers_names_the_field(smollm2: Tokenizer) -> None:
    assert smollm2.fim is None
    with pytest.raises(InvalidRequestError, match="no fill-in-the-middle tokens") as caught:
        smollm2.encode_fim("a", "b")
    assert caught.value.param == "suffix"


@pytest.mark.parametrize(
    "spelling",
    [
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ],
)
def test_encode_fim_takes_every_family_of_markers(spelling: tuple[str, str, str]) -> None:
    tokenizer = Tokenizer(helpers.tiny_tokenizer((*helpers.CHAT_SPECIALS, *spelling)))
    before, after, middle = spelling
    ids = tokenizer.encode_fim("x = ", ";\n")
    assert tokenizer.decode(ids) == f"{before}x = {after};\n{middle}"
    assert b"".join(map(tokenizer.token_bytes, ids)) == tokenizer.decode(ids).encode()


def test_eos_token_ids_include_those_of_the_generation_config(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    before = Tokenizer.from_dir(directory).eos_token_ids
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert Tokenizer.from_dir(directory).eos_token_ids == before | {7, 9}
    (directory / "generation_config.json").write_text('{"eos_token_id": 11}')
    assert Tokenizer.from_dir(directory).eos_token_ids == before | {11}


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Code Llama's kind of tokenizer in small: `▁` for space, one before each text, byte tokens."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [*"▁abcxyz=;()", "▁x"]
    merges = [("▁", "x")]
    raw = RawTokenizer(
        models.BPE(
            {word: token_id for token_id, word in enumerate(words)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.add_special_tokens({"additional_special_tokens": ["▁<PRE>", "▁<SUF>", "▁<MID>"]})
    return wrapped


def test_token_bytes_of_sentencepiece_spell_the_text_after_a_space() -> None:
    tokenizer = Tokenizer(sentencepiece_like())
    text = "x = π;\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = [tokenizer.token_bytes(token_id) for token_id in ids]
    assert b"".join(pieces) == b" " + text.encode()
    assert b"\n" in pieces
    assert b"\xcf" in pieces


def test_encode_fim_of_sentencepiece_puts_no_space_before_the_suffix() -> None:
    tokenizer = Tokenizer(sentencepiece_like())
    assert tokenizer.fim is not None
    ids = tokenizer.encode_fim("x", ";y")
    middle = ids[ids.index(tokenizer.fim.suffix) + 1 : -1]
    assert b"".join(map(tokenizer.token_bytes, middle)) == b";y"
    assert [ids[0], ids[-1]] == [tokenizer.fim.prefix, tokenizer.fim.middle]


def test_from_dir_without_a_tokenizer_says_which_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=str(tmp_path)):
        Tokenizer.from_dir(tmp_path)


def test_from_dir_with_a_damaged_generation_config_says_which_file(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        Tokenizer.from_dir(directory)
