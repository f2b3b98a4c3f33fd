"""ClassEval: whole classes from a skeleton (Du et al., arXiv:2308.01861), generated in one go.

Every class of tests is a run of its own, as in the paper's harness: a method counts as solved when
its test class passes, the class when all test classes do. Prompts are the paper's, *holistic
generation*; a base model gets it in the form of instruction and response.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
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
# Names from the source, since the program can reach the class of the loader that would look for
# them; and each test has to report that it succeeded: one that was not found, was skipped or was
# expected to fail reports something else.
_RUN = """
{test}

import unittest as _unittest
class _Result(_unittest.TestResult):
    def addSuccess(self, test):
        _passed.append(test._testMethodName)
_passed, _result = [], _Result()
_unittest.TestSuite(map({test_class}, {tests})).run(_result)
if _passed != {tests} or not _passed:
    _faults = _result.errors + _result.failures
    _last = _faults[0][1].strip().splitlines()[-1] if _faults else "not run to their ends"
    raise AssertionError(f"{{len(_passed)}} of {count} tests passed: {{_last}}")
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
    entry.check_code(import_statement=head)
    defined = _classes(entry.parsed("test", test))
    for each in test_classes:
        if each not in defined:
            raise entry.bad(f"test_classes names {each!r}, which the field test doesn't define")
        if not _test_names(each, defined):
            raise entry.bad(
                f"test_classes names {each!r}, which has no test (a method test…) in the field "
                "test, so nothing would pass"
            )
    return Problem(
        task_id=entry.name(),
        base_prompt=_BASE.format(task=task, skeleton=skeleton.rstrip()),
        chat_prompt=f"{task} {_CHAT}\n\n```python\n{skeleton.rstrip()}\n```",
        head=head,
        checks={each: _check(test, each, _test_names(each, defined)) for each in test_classes},
        mutated=_methods(entry),
        solution=entry.text("solution_code"),
    )


def _check(test: str, test_class: str, tests: Sequence[str]) -> str:
    return _RUN.format(test=test, test_class=test_class, tests=list(tests), count=len(tests))


def _classes(test: ast.Module) -> dict[str, ast.ClassDef]:
    """Classes by name; of several with one name the last, as when the source is run."""
    return {node.name: node for node in test.body if isinstance(node, ast.ClassDef)}


def _test_names(test_class: str, defined: Mapping[str, ast.ClassDef]) -> list[str]:
    """Of a class and of those of the same source that it inherits from; in `unittest`'s order."""
    names: set[str] = set()
    seen: set[str] = set()
    waiting = [test_class]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in defined:
            continue
        seen.add(name)
        node = defined[name]
        waiting += [base.id for base in node.bases if isinstance(base, ast.Name)]
        names |= {
            each.name
            for each in node.body
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
            and each.name.startswith("test")
        }
    return sorted(names)


def _methods(entry: Entry) -> frozenset[str]:
    names = set()
    for method in entry.fields.get("methods_info") or ():
        if not isinstance(method, dict) or not isinstance(method.get("method_name"), str):
            raise entry.wrong("methods_info", method, "a list of objects with a method_name")
        names.add(method["method_name"])
    if not names:
        raise entry.bad("no field 'methods_info'")
    return frozenset(names)
