"""Text to token ids and back, over the tokenizer that comes with a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ponderttt.errors import InvalidRequestError, ModelError

# Prefix, suffix and middle markers of the code models that have them: Qwen and CodeGemma,
# StarCoder, SantaCoder, CodeLlama, DeepSeek (whose "hole" stands before the suffix).
_FIM_SPELLINGS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
# Markers after which a model has nothing more to say, though checkpoints often name only one:
# a chat model ends its turn with `<|im_end|>` and what it fills in with `<|endoftext|>`.
_END_SPELLINGS = ("<|im_end|>", "<|endoftext|>")
# A character no code starts with, to keep sentencepiece from putting a space before a suffix.
_MARK = "☺"
# The tokenizer's own limit; ids beyond the vocabulary but below this merely have no token.
_MAX_ID = 1 << 31


@dataclass(frozen=True, slots=True)
class FimTokens:
    """Ids of the three fill-in-the-middle markers."""

    prefix: int
    suffix: int
    middle: int


class Tokenizer:
    """A checkpoint's tokenizer, reduced to what serving needs.

    Encoding and decoding are safe to call from several threads.
    """

    def __init__(self, backend: Any, extra_end_ids: Sequence[int] = ()) -> None:
        """Wrap a tokenizer of `transformers`.

        Args:
            backend: the tokenizer.
            extra_end_ids: ids that end a text besides the tokenizer's own.
        """
        self._backend = backend
        # We check lengths ourselves; transformers would print a warning for each long file.
        backend.model_max_length = 1 << 60
        self._extra_end_ids = tuple(extra_end_ids)

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Load the tokenizer of a model directory, without network and without its own code.

        Raises:
            ModelError: transformers can't read it.
        """
        from transformers import AutoTokenizer

        directory = Path(path)
        try:
            backend = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise ModelError(f"the tokenizer in {directory} can't be read: {error}") from error
        return cls(backend, _generation_end_ids(directory))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; markers spelt out in the text become their tokens.

        Raises:
            InvalidRequestError: the text has half a surrogate pair, so it is no valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                "text", f"character {error.start} is half a surrogate pair; send valid Unicode"
            ) from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`; incomplete UTF-8 gives U+FFFD, ids without a token give nothing.

        Raises:
            InvalidRequestError: an id is negative or does not fit 31 bits.
        """
        if any(not 0 <= token_id < _MAX_ID for token_id in ids):
            raise InvalidRequestError("tokens", f"ids lie between 0 and {self.vocab_size - 1}")
        text: str = self._backend.decode(
            list(ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint says how a chat is written."""
        return bool(self._backend.chat_template)

    def apply_chat_template(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a chat, by the checkpoint's own template.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: whether to open the assistant's answer at the end.
        Raises:
            InvalidRequestError: there is no template, or it refuses the messages.
        """
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise InvalidRequestError(
                "messages", "this model has no chat template; use /v1/completions"
            )
        try:
            text = self._backend.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise InvalidRequestError(
                "messages", f"the model's chat template refuses them: {error}"
            ) from error
        # The template writes the opening token itself.
        return self.encode(text, add_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that one token stands for; empty for an id without a token.

        The bytes of a text's tokens, put together, are the text in UTF-8 (sentencepiece puts a
        space before the first word). A token may hold a part of a character only.
        """
        if (added := self._added.get(token_id)) is not None:
            return added.encode()
        if not 0 <= token_id < _MAX_ID:
            return b""
        token = self._backend.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            # A character outside the table stands for itself, as in the tokenizer's own decoder.
            return b"".join(bytes([_BYTES[c]]) if c in _BYTES else c.encode() for c in str(token))
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return str(token).replace("▁", " ").encode()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's output may be padded beyond it."""
        return len(self._backend)

    @property
    def bos_token_id(self) -> int | None:
        """The token that opens a text, where the checkpoint names one."""
        token_id: int | None = self._backend.bos_token_id
        return token_id

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer.

        The tokenizer's own, those of `generation_config.json`, and `<|im_end|>` and
        `<|endoftext|>` where the vocabulary has them as special tokens.
        """
        spelt = (self._special(spelling) for spelling in _END_SPELLINGS)
        ids = (self._backend.eos_token_id, *self._extra_end_ids, *spelt)
        return frozenset(token_id for token_id in ids if token_id is not None)

    @cached_property
    def fim(self) -> FimTokens | None:
        """The fill-in-the-middle markers, None where the vocabulary has none."""
        for spelling in _FIM_SPELLINGS:
            prefix, suffix, middle = (self._special(marker) for marker in spelling)
            if prefix is not None and suffix is not None and middle is not None:
                return FimTokens(prefix, suffix, middle)
        return None

    def encode_fim(self, prefix: str, suffix: str) -> list[int]:
        """Token ids that ask the model for the text between `prefix` and `suffix`.

        In the order prefix, suffix, middle (PSM; Bavarian et al., arXiv:2207.14255, section 3).

        Raises:
            InvalidRequestError: the model has no fill-in-the-middle tokens.
        """
        if self.fim is None:
            raise InvalidRequestError(
                "suffix",
                "this model has no fill-in-the-middle tokens; leave the suffix out or serve a "
                "code model such as qwen2.5-coder-0.5b",
            )
        before = self.encode(prefix, add_special_tokens=False)
        after = self._encode_continuation(suffix)
        fim = self.fim
        return [*self._opening, fim.prefix, *before, fim.suffix, *after, fim.middle]

    @cached_property
    def _opening(self) -> list[int]:
        """What the tokenizer puts before every text: the opening token or nothing."""
        return [token_id for token_id in self.encode("")[:1] if token_id == self.bos_token_id]

    def _encode_continuation(self, text: str) -> list[int]:
        """Encode text that goes on after a marker, without the space sentencepiece would add."""
        if self._is_byte_level:
            return self.encode(text, add_special_tokens=False)
        mark = self.encode(_MARK, add_special_tokens=False)
        ids = self.encode(_MARK + text, add_special_tokens=False)
        if ids[: len(mark)] == mark:
            return ids[len(mark) :]
        return self.encode(text, add_special_tokens=False)

    def _special(self, spelling: str) -> int | None:
        """A marker's id; text that merely looks like one is no marker."""
        return self._added_ids.get(spelling)

    @cached_property
    def _added(self) -> dict[int, str]:
        added = self._backend.added_tokens_decoder
        return {token_id: str(token.content) for token_id, token in added.items()}

    @cached_property
    def _added_ids(self) -> dict[str, int]:
        return {spelling: token_id for token_id, spelling in self._added.items()}

    @cached_property
    def _is_byte_level(self) -> bool:
        """Whether tokens spell bytes in GPT-2's alphabet, rather than text with `▁` for space."""
        backend = getattr(self._backend, "backend_tokenizer", None)
        if backend is None:
            return False
        decoder = json.loads(backend.to_str()).get("decoder")
        return "ByteLevel" in json.dumps(decoder)


def _generation_end_ids(directory: Path) -> list[int]:
    """`eos_token_id` of generation_config.json: one id, several, or none."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return []
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} can't be read: {error}") from error
    if value is None:
        return []
    return [int(token_id) for token_id in (value if isinstance(value, list) else [value])]


def _byte_level_table() -> dict[str, int]:
    """GPT-2's alphabet, reversed: printable bytes stand for themselves, others are moved up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = (byte for byte in range(256) if byte not in printable)
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + offset): byte for offset, byte in enumerate(moved)}


_BYTES = _byte_level_table()
