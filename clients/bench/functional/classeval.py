"""ClassEval: whole classes from a skeleton (Du et al., arXiv:2308.01861), generated in one go.

Every class of tests is a run of its own, as in the paper's harness: a method counts as solved when
its test class passes, the class when all test classes do. Prompts are the paper's, *holistic
generation*; a base model gets it in the form of instruction and response.
"""

from __future__ import annotations

import ast
from pathlib import Path

from clients.bench.functional.answers import fenced_block
from clients.bench.functional.data import Entry, is_file, read_file, read_hub
from clients.bench.functional.problems import Problem, Suite

HUB = "FudanSELab/ClassEval"
_TASK = "Please complete the class {name} in the following code."
_CHAT = "Reply with the complete class in one Python code block."
_BASE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{task}\n{skeleton}\n\n### Response:\n"
)
_SECTION = "\n###"
_CODE = ("class ", "import ", "from ", "@", "def ", "#", '"""')
# A loader of its own, since the program can reach the one that is there; and all tests must have
# run: one that the loader does not find, or that the program skips, would pass.
_RUN = """
{test}

import unittest as _unittest
_result = _unittest.TestResult()
_unittest.TestLoader().loadTestsFromTestCase({test_class}).run(_result)
_faults = _result.errors + _result.failures + _result.skipped
if _faults or _result.testsRun < {tests}:
    _last = _faults[0][1].strip().splitlines()[-1] if _faults else "no test was run"
    raise AssertionError(f"{{len(_faults)}} of {{_result.testsRun}} tests: {{_last}}")
"""


def load_classeval(data: str | None) -> Suite:
    """The problems.

    Args:
        data: a file, or the name of a data set on the hub that has ClassEval's schema.
    Raises:
        InvalidRequestError: a record lacks a field.
        PonderError: the hub can't be reached.
    """
    name = data or HUB
    entries = read_file(Path(name)) if is_file(name) else read_hub(name, None, "test")
    return Suite(
        name="classeval",
        source=name,
        problems=tuple(map(_problem, entries)),
        stops=(_SECTION,),
        cut=until_section,
        checks_are="test classes",
    )


def until_section(answer: str) -> str:
    """What comes before the next section: the fenced block, or what begins like code."""
    answer = answer.partition(_SECTION)[0]
    if "```" in answer:
        return fenced_block(answer)
    lines = answer.splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if line.startswith(_CODE)), 0)
    return "".join(lines[first:])


def _problem(entry: Entry) -> Problem:
    skeleton, class_name = entry.text("skeleton"), entry.text("class_name")
    task = _TASK.format(name=class_name)
    head = "\n".join(entry.texts("import_statement", default=())) + "\n"
    test, test_classes = entry.text("test"), entry.texts("test_classes")
    if not test_classes:
        raise entry.bad("test_classes is empty, so anything would pass")
    for each in test_classes:
        if not each.isidentifier() or f"class {each}" not in test:
            raise entry.bad(f"test_classes names {each!r}, which the field test doesn't define")
    return Problem(
        task_id=entry.name(),
        base_prompt=_BASE.format(task=task, skeleton=skeleton.rstrip()),
        chat_prompt=f"{task} {_CHAT}\n\n```python\n{skeleton.rstrip()}\n```",
        head=head,
        checks={
            each: _RUN.format(test=test, test_class=each, tests=_count_tests(entry, test, each))
            for each in test_classes
        },
        mutated=_methods(entry),
        solution=entry.text("solution_code"),
    )


def _count_tests(entry: Entry, test: str, test_class: str) -> int:
    """Tests that a class defines itself; 1 at least, where they are all inherited."""
    try:
        tree = ast.parse(test)
    except SyntaxError as error:
        raise entry.bad(f"test is no Python: {error}") from error
    own = [
        sum(isinstance(f, ast.FunctionDef) and f.name.startswith("test") for f in node.body)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name == test_class
    ]
    return max([1, *own])


def _methods(entry: Entry) -> frozenset[str]:
    names = set()
    for method in entry.fields.get("methods_info") or ():
        if not isinstance(method, dict) or not isinstance(method.get("method_name"), str):
            raise entry.wrong("methods_info", method, "a list of objects with a method_name")
        names.add(method["method_name"])
    if not names:
        raise entry.bad("no field 'methods_info'")
    return frozenset(names)
