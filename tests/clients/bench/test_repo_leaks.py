"""Which files give away what is hidden."""

from __future__ import annotations

import random

import pytest

from clients.bench.repo_leaks import Text, gives_away
from clients.bench.repo_targets import Target, find_targets
from tests.helpers import source_text

SUBJECT = """\
import json

MARGIN = "so much text before anything may be hidden that there is something to go by"
ANOTHER = "and more of it, since two hundred characters are the least that a target has before it"


def load(path):
    with open(path) as stream:
        content = json.load(stream)
        return content["settings"]


def greet(names):
    for name in names:
        print("hello", name)
    return configure_everything(names, quickly=True)
"""


def target(hidden: str) -> Target:
    found = [each for kind in find_targets(SUBJECT, 8).values() for each in kind]
    return next(each for each in found if each.hidden.strip() == hidden)


CALL = target('("hello", name')
SHORT = target('return content["settings"]')
LONG = target("return configure_everything(names, quickly=True)")
BLOCK = next(each for each in find_targets(SUBJECT, 8)["block"] if each.line == 9)


@pytest.mark.parametrize(
    ("text", "hidden", "given_away"),
    [
        ("def f():\n    return configure_everything(names, quickly=True)\n", LONG, True),
        ("x = configure_everything(names, quickly=True)\n", LONG, False),
        # A short line may stand anywhere, but not after the same one.
        ('def f(content):\n    return content["settings"]\n', SHORT, False),
        ('content = json.load(stream)\n\nreturn content["settings"]\n', SHORT, True),
        ('print("hello", name)\n', CALL, False),
        ('if 1:\n  for name in names:\n    print("hello", name)\n', CALL, True),
        ('a = 1\ncontent = json.load(stream)\nreturn content["settings"]', BLOCK, True),
        ('content = json.load(stream)\na = 1\nreturn content["settings"]', BLOCK, False),
        ("", BLOCK, False),
    ],
)
def test_file_with_the_hidden_lines_gives_them_away(
    text: str, hidden: Target, given_away: bool
) -> None:
    assert gives_away(Text(text), SUBJECT, [hidden]) is given_away


@pytest.mark.parametrize(("kept", "is_copy"), [(1.0, True), (0.7, True), (0.2, False)])
def test_copy_is_known_by_the_lines_that_it_has_kept(kept: float, is_copy: bool) -> None:
    rng = random.Random(0)
    lines = source_text().splitlines()
    other = [line if rng.random() < kept else f"{line} # {rng.random()}" for line in lines]
    rng.shuffle(other)
    assert gives_away(Text("\n".join(other)), source_text(), []) is is_copy
