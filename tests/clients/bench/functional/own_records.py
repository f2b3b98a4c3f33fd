"""Small data sets of our own in the schemas of MBPP and ClassEval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MBPP: list[dict[str, Any]] = [
    {
        "task_id": number,
        "text": f"Write a function to multiply a number by {number}.",
        "code": f"def times_{number}(x):\r\n  return x * {number}\r\n",
        "test_list": [f"assert times_{number}(2) == {2 * number}"],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    for number in (2, 3, 4)
] + [
    {
        "task_id": 11,
        "text": "Write a function to join the nodes of a linked list with commas.",
        "code": (
            "class Node:\n    def __init__(self, value, rest=None):\n"
            "        self.value, self.rest = value, rest\n\n"
            "def joined(node):\n"
            "    return ','.join(values(node))\n\n"
            "def values(node):\n"
            "    return [] if node is None else [str(node.value), *values(node.rest)]\n"
        ),
        "test_list": ["assert joined(chain) == '1,2'", "assert joined(None) == ''"],
        "test_setup_code": "chain = Node(1, Node(2))",
        "challenge_test_list": [],
    },
    # The schema of the sanitized subset.
    {
        "task_id": 12,
        "source_file": "own",
        "prompt": "Write a function to find the area of a circle.",
        "code": "import math\n\ndef area(radius):\n    return math.pi * radius ** 2\n",
        "test_imports": ["from math import isclose"],
        "test_list": ["assert isclose(area(1), 3.14159265, rel_tol=1e-6)"],
    },
]

_TEST = """import unittest


class CounterTestAdd(unittest.TestCase):
    def test_add_1(self):
        counter = Counter()
        self.assertEqual(counter.add("a"), 1)
        self.assertEqual(counter.add("a"), 2)


class CounterTestMost(unittest.TestCase):
    def test_most_1(self):
        counter = Counter()
        for word in ("a", "b", "b"):
            counter.counts[word] = counter.counts.get(word, 0) + 1
        self.assertEqual(counter.most(), "b")


class CounterTest(unittest.TestCase):
    def test_counter(self):
        counter = Counter()
        for word in ("x", "y", "x"):
            counter.add(word)
        self.assertEqual(counter.most(), "x")


if __name__ == "__main__":
    unittest.main()
"""
CLASSEVAL: list[dict[str, Any]] = [
    {
        "task_id": "Own_0",
        "skeleton": (
            'class Counter:\n    """\n    Counts words.\n    """\n\n'
            "    def __init__(self):\n        self.counts = {}\n\n"
            '    def add(self, word):\n        """\n        Count a word.\n'
            "        :return: int, how often it came\n        >>> Counter().add('a')\n        1\n"
            '        """\n\n'
            '    def most(self):\n        """\n        The most frequent word.\n        """\n'
        ),
        "test": _TEST,
        "solution_code": (
            "class Counter:\n    def __init__(self):\n        self.counts = {}\n\n"
            "    def add(self, word):\n"
            "        self.counts[word] = self.counts.get(word, 0) + 1\n"
            "        return self.counts[word]\n\n"
            "    def most(self):\n"
            "        return max(self.counts, key=itemgetter_of(self.counts))\n\n"
            "def itemgetter_of(counts):\n    return partial(getitem, counts)\n"
        ),
        "import_statement": ["from functools import partial", "from operator import getitem"],
        "class_description": "Counts words.",
        "class_name": "Counter",
        "test_classes": ["CounterTestAdd", "CounterTestMost", "CounterTest"],
        "class_constructor": "class Counter:\n    def __init__(self):\n        self.counts = {}\n",
        "fields": ["self.counts"],
        "methods_info": [
            {"method_name": "add", "test_class": "CounterTestAdd"},
            {"method_name": "most", "test_class": "CounterTestMost"},
        ],
    }
]


def write_json(path: Path, records: Sequence[Any]) -> str:
    """A JSON list."""
    path.write_text(json.dumps(records))
    return str(path)


def write_jsonl(path: Path, records: Sequence[Any]) -> str:
    """An object per line."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return str(path)
