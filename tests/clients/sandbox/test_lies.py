"""Results that say of themselves that they are right, and honest comparisons."""

from __future__ import annotations

import pytest

from clients.sandbox import Sandbox, Verdict
from tests.clients.sandbox.shared import CLOSE, QUICK

LIARS = {
    "equals_everything": "class Liar:\n    def __eq__(self, other): return True\n",
    "equals_plain_values": (
        "class Liar(int):\n"
        "    __hash__ = int.__hash__\n"
        "    def __eq__(self, other): return type(other) is int\n"
    ),
    "by_its_metaclass": (
        "class Meta(type):\n"
        "    def __eq__(cls, other): return True\n"
        "    def __hash__(cls): return hash(int)\n"
        "    __mro__ = (int, object)\n"
        "class Liar(metaclass=Meta):\n"
        "    def __eq__(self, other): return True\n"
    ),
    "is_close_to_everything": (
        "class Liar:\n"
        "    def __sub__(self, other): return self\n"
        "    def __abs__(self): return self\n"
        "    def __lt__(self, other): return True\n"
        "    def __eq__(self, other): return True\n"
    ),
}


@pytest.mark.parametrize("name", LIARS)
@pytest.mark.parametrize(
    ("result", "check"),
    [
        ("Liar()", "assert add(1, 2) == 3"),
        ("Liar()", "assert 3 == add(1, 2)"),
        ("[1, (Liar(),)]", "assert add(1, 2) == [1, (3,)]"),
        ("{'a': Liar()}", "assert add(1, 2) == {'a': 3}"),
        ("Liar()", "assert add(1, 2) in (3, 4)"),
        ("[Liar()]", "assert 3 in add(1, 2)"),
        ("Liar()", "if add(1, 2) not in [3]: raise ValueError"),
        ("Liar()", "assert 3 == add(1, 2) == 3"),
    ],
)
def test_results_with_comparisons_of_their_own_are_tampering(
    sandbox: Sandbox, name: str, result: str, check: str
) -> None:
    program = LIARS[name] + f"def add(a, b):\n    return {result}\n"
    outcome = sandbox.run(program, QUICK, check=check)
    assert outcome.verdict is Verdict.TAMPERED, outcome
    assert "of its own" in outcome.detail


IN_UNITTEST = """
import unittest

class Test(unittest.TestCase):
    def test_add(self):
        {call}

result = unittest.TestResult()
unittest.defaultTestLoader.loadTestsFromTestCase(Test).run(result)
assert result.wasSuccessful() and result.testsRun == 1, result
"""


@pytest.mark.parametrize("name", LIARS)
@pytest.mark.parametrize(
    "call",
    [
        "self.assertEqual(add(1, 2), 3)",
        "self.assertEqual(3, add(1, 2), msg='no')",
        "self.assertAlmostEqual(add(1, 2), 3)",
        "self.assertIn(add(1, 2), [3, 4])",
        "self.assertTrue(add(1, 2) == 3)",
    ],
)
def test_lies_to_unittest_are_tampering(sandbox: Sandbox, name: str, call: str) -> None:
    program = LIARS[name] + "def add(a, b):\n    return Liar()\n"
    outcome = sandbox.run(program, QUICK, check=IN_UNITTEST.format(call=call))
    assert outcome.verdict is Verdict.TAMPERED, outcome
    assert "of its own" in outcome.detail


def test_difference_that_is_denied_is_tampering(sandbox: Sandbox) -> None:
    program = (
        "class Liar:\n    def __ne__(self, other): return False\n"
        "def add(a, b):\n    return Liar()\n"
    )
    check = "if add(1, 2) != 3:\n    raise AssertionError\n"
    assert sandbox.run(program, QUICK, check=check).verdict is Verdict.TAMPERED


def test_honest_unittest_passes_and_wrong_results_fail(sandbox: Sandbox) -> None:
    program = (
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Box:\n"
        "    items: list\n"
        "    def __contains__(self, item): return item in self.items\n"
        "def add(a, b): return a + b\n"
    )
    calls = (
        "self.assertEqual(add(1, 2), 3, 'no')",
        "self.assertEqual(Box([1]), Box([1]))",
        "self.assertListEqual([Box([1])], [Box([1])])",
        "self.assertIn(1, Box([1]))",
        "self.assertIn(Box([1]), [Box([1])])",
        "self.assertAlmostEqual(add(0.1, 0.2), 0.3, places=7)",
        "self.assertGreater(add(1, 2), 2)",
        "self.assertTrue(1 in Box([1]) and 2 not in Box([1]) and Box([1]) != 3)",
        "self.assertTrue(0 < add(1, 2) <= 3 and not 1 < add(1, 2) < 3)",
    )
    check = IN_UNITTEST.format(call="; ".join(calls))
    outcome = sandbox.run(program, QUICK, check=check)
    assert outcome.passed, outcome
    wrong = program.replace("a + b", "a - b")
    assert sandbox.run(wrong, QUICK, check=check).verdict is Verdict.FAILED


def test_lie_about_a_distance_is_tampering(sandbox: Sandbox) -> None:
    program = LIARS["is_close_to_everything"] + "def add(a, b):\n    return Liar()\n"
    assert sandbox.run(program, QUICK, check=CLOSE).verdict is Verdict.TAMPERED


def test_honest_comparisons_pass(sandbox: Sandbox) -> None:
    program = (
        "from collections import Counter, namedtuple, OrderedDict\n"
        "from dataclasses import dataclass\nfrom decimal import Decimal\n"
        "from fractions import Fraction\nfrom enum import IntEnum\n"
        "Point = namedtuple('Point', 'x y')\n"
        "class Colour(IntEnum):\n    RED = 1\n"
        "@dataclass\nclass Data:\n    x: int\n"
        "class Own:\n"
        "    def __init__(self, x): self.x = x\n"
        "    def __eq__(self, other): return self.x == other.x\n"
    )
    check = (
        "assert Point(1, 2) == (1, 2)\nassert Counter('aab') == {'a': 2, 'b': 1}\n"
        "assert OrderedDict(a=1) == {'a': 1}\nassert Fraction(1, 2) == 0.5 != Decimal(1)\n"
        "assert Colour.RED == 1\nassert Data(1) == Data(1)\nassert Data(1) != 1\n"
        "assert Own(1) == Own(1)\nassert [Own(1)] == [Own(1)]\nassert 1 < 2 <= 2 > 1\n"
    )
    outcome = sandbox.run(program, QUICK, check=check)
    assert outcome.passed, outcome
