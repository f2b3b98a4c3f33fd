"""The stop rules."""

from __future__ import annotations

import pytest

from clients.bench.functional.answers import chat_completion, fenced_block, until_top_level
from clients.bench.functional.classeval import until_section
from clients.bench.functional.mbpp import until_done

CODE = "def f():\n    return 1\n"


@pytest.mark.parametrize(
    "answer",
    [
        f"Here you are:\n\n```python\n{CODE}```\nIt returns 1.",
        f"```\n{CODE}```",
        f"```py\n{CODE}```\n\nOr:\n```python\ndef f():\n    return 2\n```",
        # cut off
        f"```python\n{CODE}",
        f"~~~ no\n```python\n{CODE}\n\n```",
        # no fence at all
        CODE,
        f"1. So:\n   ```python\n{CODE}   ```\n",
        # indented with its fence, as in a list's item
        "1. So:\n   ```python\n   def f():\n       return 1\n   ```\n2. Done.",
        "- So:\n\n\t```python\n\tdef f():\n\t    return 1\n\n\t```\n",
        # line ends of another system
        f"So:\n```python\n{CODE}```\nIt returns 1.".replace("\n", "\r\n"),
        CODE.replace("\n", "\r\n"),
        # the end of a sentence
        f"The code is\n```python\n{CODE}```.\nIt returns 1.",
        f"(So:\n```python\n{CODE}```)\nIt returns 1.",
    ],
)
def test_first_fenced_block_is_the_program(answer: str) -> None:
    assert fenced_block(answer) == CODE
    assert chat_completion(answer) == "\n" + CODE


def test_longer_fence_may_hold_a_shorter_one() -> None:
    inner = 'def f():\n    """\n    ```\n    f()\n    ```\n    """\n    return 1\n'
    assert fenced_block(f"````python\n{inner}````") == inner


def test_fence_with_a_language_closes_nothing() -> None:
    inner = 'def f():\n    """\n    ```python\n    f()\n    """\n    return 1\n'
    assert fenced_block(f"```\n{inner}```") == inner


def test_inline_code_is_no_fence() -> None:
    assert fenced_block(f"Use ```f``` so:\n```python\n{CODE}```") == CODE


@pytest.mark.parametrize(
    "rest", ["def g():\n    pass", "class A:", "if x:", "print(1)", "# so", "@a", "Text.", "```"]
)
def test_base_answer_ends_at_the_next_line_at_the_margin(rest: str) -> None:
    body = "    x = 1\n\n    return x\n"
    assert until_top_level(f"{body}\n{rest}\n    y") == body
    assert until_top_level(body) == body


def test_mbpp_answer_ends_at_done() -> None:
    assert until_done(f"{CODE}[DONE]\nYou are an expert") == CODE
    assert until_done(f"```python\n{CODE}```\n[DONE]") == CODE
    assert until_done(CODE) == CODE


def test_classeval_answer_is_the_block_or_what_begins_like_code() -> None:
    code = "import math\n\n\nclass A:\n    pass\n"
    assert until_section(f"Sure:\n```python\n{code}```\n\n### Instruction:\nNow") == code
    assert until_section(f"Sure, here it is.\n{code}") == code
    assert until_section(f"{code}\n### Instruction:\nmore").rstrip() == code.rstrip()
