"""From a model's answer to the completion that is run: the stop rules.

Chat: the first fenced block, whatever language it names; up to the answer's end where the fence
isn't closed, the whole answer where there is no fence. It stands on a line of its own after the
problem's head, so a complete function replaces the one that was begun there.

Base: each data set has its own rule. It is applied to what the prompt shows of the completion
(HumanEval: the first line's indentation but for its last space) and the answer behind it. Servers
are also given up to four stop texts, which only save tokens: cutting again here makes the result
the same with servers that know no stop texts.
"""

from __future__ import annotations

import re

# Three backquotes or more at a line's beginning; the closing fence is as long as the opening one.
# After it may come the end of a sentence that the block is part of.
_BLOCK = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,})[^\n`]*\n(?P<code>.*?)"
    r"(?:^[ \t]*(?P=fence)[^\w`\n]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
# A line that is neither empty nor indented, but not the first.
_TOP_LEVEL = re.compile(r"\n(?=\S)")


def fenced_block(answer: str) -> str:
    """The first fenced block, or the whole answer where there is none; ends in a line break.

    A block in a list's item is indented as a whole, with its fence.
    """
    answer = answer.replace("\r\n", "\n")
    found = _BLOCK.search(answer)
    if found is None:
        return answer.rstrip() + "\n"
    indent, lines = found["indent"], found["code"].split("\n")
    if all(line.startswith(indent) for line in lines if line.strip()):
        lines = [line.removeprefix(indent) for line in lines]
    return "\n".join(lines).rstrip() + "\n"


def chat_completion(answer: str) -> str:
    """The completion in a chat model's answer."""
    return "\n" + fenced_block(answer)


def until_top_level(answer: str) -> str:
    """What comes before the second line that begins at the margin.

    The Codex paper ends a completion at five texts that begin such a line (a function, a class, a
    comment, `if`, `print`). This rule has all of them and any other statement at top level, so that
    prose after a function doesn't spoil it.

    Source: Chen et al., arXiv:2107.03374, section 2.1; our departure as said.
    """
    return _TOP_LEVEL.split(answer, maxsplit=1)[0]
