"""What the users ask: prompts cut from source files, the same for the same seed.

Every user has a stream of turns of its own, drawn from its own generator. So what a user asks
doesn't depend on how fast the server answers others; only how far each gets does.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clients.counting import DENSE
from clients.files import TextFile, text_files
from clients.load.distributions import Distribution
from ponderttt.errors import InvalidRequestError

# Of the standard library, where no text is named.
_DEFAULT_TEXTS = ("asyncio", "email", "http", "json")
_MAX_FILE_BYTES = 1 << 20
_MAX_CHARS = 1 << 26


@dataclass(frozen=True, slots=True)
class Corpus:
    """Source files, one after the other, each under its name.

    Args:
        text: of all.
        names: of the files.
    """

    text: str
    names: tuple[str, ...]

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Corpus:
        """All text files at and below `paths`; without any, some of Python's standard library.

        Raises:
            InvalidRequestError: there is no text, or far too much.
        """
        library = Path(sysconfig.get_paths()["stdlib"])
        files: list[TextFile] = []
        for path in paths or [library / name for name in _DEFAULT_TEXTS]:
            if not path.exists():
                raise InvalidRequestError("--texts", f"{path} doesn't exist")
            files += [f for f in text_files(path, _MAX_FILE_BYTES) if isinstance(f, TextFile)]
        text = "".join(f"# {file.path}\n{file.text.rstrip()}\n\n\n" for file in files)
        if not files:
            raise InvalidRequestError("--texts", "no text file there; name source files")
        if len(text) > _MAX_CHARS:
            raise InvalidRequestError(
                "--texts", f"{len(text)} characters, more than {_MAX_CHARS}; name fewer files"
            )
        return cls(text, tuple(file.path for file in files))

    def fingerprint(self) -> str:
        """Says whether two runs used the same texts."""
        return hashlib.sha256(self.text.encode("utf-8", "replace")).hexdigest()[:16]

    def line_start(self, generator: random.Random) -> int:
        """Where some line begins."""
        place = generator.randrange(len(self.text))
        return self.text.rfind("\n", 0, place) + 1

    def piece(self, start: int, chars: int) -> str:
        """Text from `start` on; after the end it goes on at the beginning."""
        whole, rest = divmod(start + chars, len(self.text))
        if whole == 0:
            return self.text[start:rest]
        return self.text[start:] + self.text * (whole - 1) + self.text[:rest]


@dataclass(frozen=True, slots=True)
class Turn:
    """One request that a user makes.

    Args:
        name: of the request, the same in every run with the same workload.
        user: who makes it, from 0.
        prompt: what is to be continued.
        max_tokens: of the answer.
        think: seconds that the user takes after the answer before it.
        cut: the prompt is shorter than was drawn, to fit the context.
    """

    name: str
    user: int
    prompt: str
    max_tokens: int
    think: float
    cut: bool


@dataclass(frozen=True, slots=True)
class Workload:
    """How requests are drawn.

    Args:
        corpus: of prompts.
        prompt_tokens: lengths of prompts.
        output_tokens: lengths of answers.
        think: seconds.
        reuse: share of requests whose prompt begins with the same user's last one and goes on by
            as much as was asked for, as an editor's does.
        chars_per_token: lengths are cut in characters.
        context: tokens of prompt and answer together, if known; longer prompts are cut.
        seed: of all draws.
    """

    corpus: Corpus
    prompt_tokens: Distribution
    output_tokens: Distribution
    think: Distribution
    reuse: float
    chars_per_token: float
    context: int | None
    seed: int

    def longest(self, max_tokens: int) -> int:
        """Characters of a prompt that fits beside an answer, whatever its tokens are like."""
        if self.context is None:
            return _MAX_CHARS
        room = DENSE * (self.context - max_tokens)
        return max(int(room * self.chars_per_token), 1)


@dataclass(slots=True)
class User:
    """A stream of turns.

    Args:
        workload: how they are drawn.
        index: of the user, from 0.
    """

    workload: Workload
    index: int
    _generator: random.Random = field(init=False)
    _count: int = 0
    _start: int = 0
    _chars: int = 0

    def __post_init__(self) -> None:
        self._generator = random.Random(f"{self.workload.seed}/user/{self.index}")

    def turn(self) -> Turn:
        """The next one."""
        work, generator = self.workload, self._generator
        think = work.think.draw(generator)
        tokens = work.prompt_tokens.draw(generator)
        length = max(round(tokens * work.chars_per_token), 1)
        max_tokens = max(round(work.output_tokens.draw(generator)), 1)
        fresh, start = generator.random() >= work.reuse, work.corpus.line_start(generator)
        longest = work.longest(max_tokens)
        grown = self._chars + round(max_tokens * work.chars_per_token)
        cut = False
        if fresh or self._count == 0 or grown > longest:
            self._start, self._chars, cut = start, min(length, longest), length > longest
        else:
            self._chars = grown
        name = f"{self.index}/{self._count}"
        self._count += 1
        prompt = work.corpus.piece(self._start, self._chars)
        return Turn(name, self.index, prompt, max_tokens, think, cut)


def arrivals(rate: float, seed: int) -> random.Random:
    """The generator of a Poisson process; `expovariate(rate)` of it are its gaps in seconds."""
    return random.Random(f"{seed}/arrivals/{rate!r}")
