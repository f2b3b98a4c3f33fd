"""Which files would teach a session what is hidden from it.

A repository may hold a file twice (`build/lib`, vendored copies, a twin for `asyncio`) or a piece
of one. A session that has learned the copy would be asked for what it has read. Copies in which
every line was changed, by renaming say, are not found.
"""

from __future__ import annotations

from collections.abc import Sequence

from clients.bench.repo_targets import Target

# A copy has this share of the lines that its original has, each counted once.
_COPIED = 0.5
# Shorter lines say nothing about where they come from: `else:`, `return None`.
_LEAST_LINE = 10
# A single hidden line that is shorter stands in unrelated files, too, unless what precedes it does.
_DISTINCT_LINE = 40


class Text:
    """A file's lines, without their indents and empty ones.

    Args:
        text: of the file.
    """

    def __init__(self, text: str) -> None:
        lines = [line.strip() for line in text.split("\n")]
        self._lines = "\n".join(["", *filter(None, lines), ""])
        self._telling = {line for line in lines if len(line) >= _LEAST_LINE}

    def holds(self, lines: Sequence[str]) -> bool:
        """Whether they stand in it, one after another."""
        return "\n".join(["", *lines, ""]) in self._lines

    def is_copy_of(self, original: Text) -> bool:
        """Whether it has half of the original's lines, or more."""
        shared = len(self._telling & original._telling)
        return shared > 0 and shared >= _COPIED * len(original._telling)


def gives_away(text: Text, subject: str, targets: Sequence[Target]) -> bool:
    """Whether a file is nearly a copy of the subject, or holds what is hidden in it.

    Args:
        text: of the file.
        subject: the text that the targets are hidden in.
        targets: of the subject.
    """
    if text.is_copy_of(Text(subject)):
        return True
    return any(text.holds(hidden_lines(subject, target)) for target in targets)


def hidden_lines(subject: str, target: Target) -> list[str]:
    """The lines of a target as `Text` has them; a short one with the line before it."""
    start = subject.rfind("\n", 0, target.start) + 1
    end = subject.find("\n", target.end)
    whole = subject[start : end if end >= 0 else None]
    lines = [line.strip() for line in whole.split("\n") if line.strip()]
    if sum(map(len, lines)) < _DISTINCT_LINE:
        before = [line.strip() for line in subject[:start].split("\n") if line.strip()]
        lines = [*before[-1:], *lines]
    return lines
