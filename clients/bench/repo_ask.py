"""Asking a server for one target, and the loss of a text.

Asking never teaches: every completion says `gate: off`, so a session changes by its lessons alone.
The hidden text is scored before it is asked for. Whatever a server can keep of the prompt it has
read by then, in every arm alike: so `seconds` is the price of the answer alone, as an editor sees
it whose prompt grows by a keystroke. `read_seconds` is the price of a prompt that the arm sees for
the first time; see `cached_tokens` for what earlier arms have left of it in the server.

`loss` is of the session's weights. Where the server answers with the base model's, since these
predict the prompt better, `answer_loss` is of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from clients.answers import Logprobs
from clients.bench.code_metrics import compare_code, cut
from clients.bench.repo_plan import left_context
from clients.bench.repo_targets import Target
from clients.counting import CHARS_PER_TOKEN, DENSE, count_tokens
from clients.files import TextFile
from ponderttt.errors import PonderError

if TYPE_CHECKING:
    from clients.api import Client, Completion

_SHORT = 64
# Joining texts can cost a token at every seam.
_SPARE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Asking:
    """How a server is asked.

    Args:
        model: as the server names it.
        left_chars: of the file before the target.
        max_tokens: of a block; lines and arguments get 64 at most.
        with_loss: score the hidden text; servers without `echo` can't.
        has_sessions: the server is ours and takes `ttt`.
        read: whose weights answer in a session: `auto` or `session`; None is the server's default.
    """

    model: str
    left_chars: int
    max_tokens: int
    with_loss: bool
    has_sessions: bool
    read: str | None = None

    def ttt(self, session: str | None) -> dict[str, Any] | None:
        """Read with the session's fast weights, and learn nothing."""
        if not self.has_sessions:
            return None
        if session is None:
            return {"gate": "off"}
        return {"gate": "off", "session": session} | ({"read": self.read} if self.read else {})

    def limit(self, target: Target) -> int:
        """Tokens that may be generated."""
        return self.max_tokens if target.kind == "block" else min(_SHORT, self.max_tokens)


@dataclass(frozen=True, slots=True)
class Loss:
    """Of a text.

    Args:
        nats: in all.
        tokens: that begin or end in the text.
        cached_tokens: of the prompt, read before; None where the server doesn't tell.
        seconds: of the request.
    """

    nats: float
    tokens: int
    cached_tokens: int | None
    seconds: float

    @property
    def per_token(self) -> float:
        """The mean; some token always counts."""
        return self.nats / self.tokens


def measure_loss(client: Client, asking: Asking, left: str, text: str, session: str | None) -> Loss:
    """Loss of `text` after `left`; of all but the first token where `left` is empty.

    A token that reaches from `left` into `text` counts as a whole.

    Raises:
        PonderError: the server doesn't score prompts, or not every token, or scored another text.
    """
    answer = client.complete(
        left + text,
        model=asking.model,
        max_tokens=0,
        echo=True,
        logprobs=1,
        ttt=asking.ttt(session),
    )
    scored = answer.choices[0].logprobs
    if scored is None:
        raise PonderError(
            "the server gave no log-probabilities of the prompt; give --no-loss to do without"
        )
    # A server that takes no notice of `echo` scores what it has generated itself.
    lengths = {len(scored.tokens), len(scored.token_logprobs), len(scored.text_offset)}
    if answer.text != left + text or len(lengths) > 1:
        raise PonderError(
            "the server scored another text than the prompt; it may not know echo with max_tokens "
            "0: give --no-loss to do without"
        )
    kept = _scores(scored, len(left), len(left) + len(text))
    return Loss(-sum(kept), len(kept), answer.cached_tokens, answer.seconds)


def _scores(scored: Logprobs, begin: int, end: int) -> list[float]:
    """Log-probabilities of the tokens that begin or end behind `begin`, of a text up to `end`.

    Nothing predicts a prompt's first token. A server that scores others not either would have the
    best loss there is.
    """
    if any(offset < 0 for offset in scored.text_offset):
        raise PonderError(
            "the server doesn't say where in the prompt its tokens begin; give --no-loss to do "
            "without"
        )
    kept = []
    ends = [*scored.text_offset[1:], end]
    for place, (token, score) in enumerate(zip(scored.tokens, scored.token_logprobs, strict=True)):
        if ends[place] <= begin or (place == 0 and score is None):
            continue
        if score is None or not math.isfinite(score):
            raise PonderError(
                f"the server gave {'nothing' if score is None else score} as the log-probability "
                f"of token {place} of the prompt, {token!r}; give --no-loss to do without"
            )
        kept.append(score)
    if not kept:
        raise PonderError("the server scored no token of the text; give --no-loss to do without")
    return kept


def ask(
    client: Client,
    asking: Asking,
    file: TextFile,
    target: Target,
    stuffing: str,
    session: str | None,
) -> dict[str, Any]:
    """Ask for a target; what came of it, as fields of a record.

    Args:
        client: of the server.
        asking: how.
        file: that holds the target; only what stands before it is shown.
        target: what is hidden.
        stuffing: put before the prompt; may be empty.
        session: whose fast weights; None: the base model's.
    """
    prompt = stuffing + left_context(file.text, target.start, asking.left_chars)
    fields: dict[str, Any] = {}
    if asking.with_loss:
        loss = measure_loss(client, asking, prompt, target.hidden, session)
        fields = {
            "loss": loss.per_token,
            "loss_per_char": loss.nats / len(target.hidden),
            "loss_nats": loss.nats,
            "loss_tokens": loss.tokens,
            "cached_tokens": loss.cached_tokens,
            "read_seconds": loss.seconds,
        }
    answer = client.complete(
        prompt,
        model=asking.model,
        max_tokens=asking.limit(target),
        temperature=0.0,
        stop=stops(target),
        ttt=asking.ttt(session),
    )
    completion = cut(target, answer.text)
    choice = _choice(answer)
    # Where the server tells of no choice, it had none: the session answers.
    answered_by = "session" if choice is None else str(choice.get("read"))
    if asking.with_loss:
        fields["answer_loss"] = fields["loss"]
        if session is not None and answered_by == "base":
            loss = measure_loss(client, asking, prompt, target.hidden, None)
            fields["answer_loss"] = loss.per_token
    if session is not None:
        fields |= {"answered_by": answered_by, "choice": choice}
    return fields | {
        **asdict(compare_code(target, completion)),
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "seconds": answer.seconds,
        "hidden": target.hidden,
        "completion": completion,
        "answer": answer.text,
    }


def _choice(answer: Completion) -> Mapping[str, Any] | None:
    """The prompt's losses by both weights and whose answered, where they were compared."""
    choice = answer.ttt.get("choice") if answer.ttt is not None else None
    return choice if isinstance(choice, Mapping) else None


def stops(target: Target) -> list[str]:
    """Texts after which nothing can belong to the target; four at most, as OpenAI has it."""
    if target.kind != "block":
        return ["\n"]
    own = "\n" + " " * target.indent
    return list(dict.fromkeys(["\ndef ", "\nclass ", f"{own}def ", f"{own}@"]))


@dataclass(slots=True)
class Stuffing:
    """The usual way: files put in front of the prompt, up to the model's context.

    Args:
        client: counts tokens.
        asking: how.
        limit: tokens of prompt and answer together.
        warn: called with what a user should know.
    """

    client: Client
    asking: Asking
    limit: int
    warn: Callable[[str], None]
    _estimates: bool = False

    def prefix(
        self, files: Sequence[TextFile], subject: TextFile, targets: Sequence[Target]
    ) -> str:
        """As much of the files as fits before any of the subject's targets.

        It is the same for all targets of a subject, so that the server can keep it. The last files
        are the nearest and stay; of the first that doesn't fit, the beginning stays.

        Args:
            files: what a session would have learned by now, in that order.
            subject: the file with the targets.
            targets: its targets.
        """
        room = self.limit - _SPARE_TOKENS - max(self._needed(subject, each) for each in targets)
        pieces: list[str] = []
        for file in reversed(files):
            if room <= 0:
                break
            piece = f"# {file.path}\n{file.text.rstrip()}\n\n\n"
            tokens = self._count(piece) + 1
            if tokens > room:
                piece = self._beginning(piece, room)
                tokens = room
            pieces.append(piece)
            room -= tokens
        if files and not any(pieces):
            self.warn(
                f"{subject.path}: no other file fits into a prompt of {self.limit} tokens, so arm "
                "stuffed asks as off does; give more --stuff-tokens, if the model's context has "
                "them, or fewer --left-chars"
            )
        return "".join(reversed(pieces))

    def _needed(self, subject: TextFile, target: Target) -> int:
        left = left_context(subject.text, target.start, self.asking.left_chars)
        asked = self._count(left) + self.asking.limit(target)
        return max(asked, self._count(left + target.hidden))

    def _count(self, text: str) -> int:
        tokens = None if self._estimates else count_tokens(self.client, text)
        if tokens is not None:
            return tokens
        if not self._estimates:
            self._estimates = True
            self.warn(
                "the server has no /tokenize to ask: how much fits into the stuffed prompt is "
                "estimated by its characters, and less is put there than would fit"
            )
        # A prompt that is too long would be refused.
        return math.ceil(len(text) / (CHARS_PER_TOKEN * DENSE))

    def _beginning(self, text: str, room: int) -> str:
        """Whole lines of at most `room` tokens, by halving."""
        lines = text.splitlines(keepends=True)
        low, high = 0, len(lines) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._count("".join(lines[:middle])) < room:
                low = middle
            else:
                high = middle - 1
        # A lone heading tells nothing.
        return "".join(lines[:low]) if low > 1 else ""
