"""How tokens are drawn for one request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ponderttt.errors import InvalidRequestError

MAX_N = 16
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 1000


def _in_range(param: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError(param, f"{value!r} is not a number")
    # `not (low <= value <= high)` also refuses NaN.
    if not low <= value <= high:
        raise InvalidRequestError(param, f"{value} lies outside [{low:g}, {high:g}]")


def _whole(param: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(param, f"{value!r} is not a whole number")
    if high is None and value < low:
        raise InvalidRequestError(param, f"{value} is too small; give {low} or more")
    if high is not None and not low <= value <= high:
        raise InvalidRequestError(param, f"{value} lies outside [{low}, {high}]")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters with the meaning that OpenAI and vLLM give them.

    Args:
        max_tokens: new tokens at most; 0 scores the prompt only.
        temperature: in [0, 2]; 0 is greedy.
        top_p: nucleus mass in (0, 1].
        top_k: tokens kept; 0 (or -1, as vLLM writes it) keeps all.
        min_p: least probability relative to the best token, in [0, 1].
        n: sequences per prompt, in [1, 16].
        stop: strings that end the text (left out of it).
        stop_token_ids: tokens that end the text.
        ignore_eos: go on after an end-of-text token.
        seed: makes the draw reproducible; None draws a seed.
        presence_penalty, frequency_penalty: in [-2, 2], on generated tokens.
        repetition_penalty: in (0, 10], on prompt and generated tokens; 1 is none.
        logit_bias: added to the logits of these token ids, each in [-100, 100].
        logprobs: top alternatives to report per generated token, 0 … 20; None reports nothing.
        prompt_logprobs: the same for the prompt's tokens.
    Raises:
        InvalidRequestError: naming the field, value and limit.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, 0)
        _in_range("temperature", self.temperature, 0.0, 2.0)
        _in_range("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequestError("top_p", "0 keeps no token; give more than 0, up to 1")
        _whole("top_k", self.top_k, -1)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _whole("n", self.n, 1, MAX_N)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, 10.0)
        if self.repetition_penalty == 0.0:
            raise InvalidRequestError("repetition_penalty", "0 divides by zero; 1 is no penalty")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _whole(name, count, 0, MAX_LOGPROBS)
        for token, bias in self.logit_bias.items():
            _in_range(f"logit_bias.{token}", bias, -100.0, 100.0)
        self._check_stops()
        if self.seed is not None:
            if isinstance(self.seed, bool) or not isinstance(self.seed, int):
                raise InvalidRequestError("seed", f"{self.seed!r} is not a whole number")
            if not -(2**63) <= self.seed < 2**63:
                raise InvalidRequestError("seed", f"{self.seed} does not fit 64 bits")

    def _check_stops(self) -> None:
        if isinstance(self.stop, str):
            raise InvalidRequestError("stop", f"{self.stop!r} is one string; give a tuple of them")
        if len(self.stop) > MAX_STOPS:
            raise InvalidRequestError("stop", f"{len(self.stop)} strings; at most {MAX_STOPS}")
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_CHARS:
                raise InvalidRequestError(
                    "stop", f"a string of {len(text)} characters; give 1 to {MAX_STOP_CHARS}"
                )
