"""Attempts to pass without doing the work: patches, exchanges and forged results."""

from __future__ import annotations

import pytest

from clients.sandbox import Sandbox, Verdict
from tests.clients.sandbox.shared import CHECK, CLOSE, QUICK

WRONG = "def add(a, b):\n    return 0\n"
UNITTEST = """
import unittest

class Test(unittest.TestCase):
    def test_add(self):
        self.assertEqual(add(1, 2), 3)

result = unittest.TextTestRunner().run(
    unittest.defaultTestLoader.loadTestsFromTestCase(Test)
)
assert result.wasSuccessful()
"""

_PIPES = (
    "import marshal, os, sys\n"
    "source, result = int(sys.orig_argv[-8]), int(sys.orig_argv[-7])\n"
    "code = marshal.dumps(compile('pass', '<check>', 'exec'))\n"
    "own = len(code).to_bytes(8, 'big') + code\n"
)
#: With the function `check_pipe` at hand, so that nobody notices.
_OWN_CHECK = (
    "check_pipe.__code__ = (lambda *a: None).__code__\n"
    "r, w = os.pipe()\nos.write(w, own)\nos.dup2(r, source)\n"
)
#: What the program does before it is checked, and the check.
FORGERIES = {
    "prints_passed": ("print('passed'); print('PASSED'); print('1 passed in 0.01s')", CHECK),
    "writes_to_all_descriptors": (
        "import os\n"
        "for n in range(256):\n"
        "    for text in (b'passed', b'P\\x00\\x00', b'P\\x00\\x10' + bytes(16)):\n"
        "        try: os.write(n, text)\n"
        "        except OSError: pass\n",
        CHECK,
    ),
    "patches_builtins": (
        "import builtins\n"
        "builtins.abs = lambda x: 0\nbuiltins.len = lambda x: 0\n"
        "builtins.exec = builtins.compile = lambda *a, **k: None\n"
        "builtins.isinstance = lambda *a: True\nbuiltins.AssertionError = SystemExit\n",
        CLOSE,
    ),
    "patches_the_assert_helpers": (
        "import unittest\n"
        "unittest.TestCase.assertEqual = lambda *a, **k: None\n"
        "unittest.TestCase.run = lambda self, result=None: result\n"
        "unittest.TestResult.wasSuccessful = lambda self: True\n"
        "unittest.TextTestResult.wasSuccessful = lambda self: True\n",
        UNITTEST,
    ),
    "replaces_a_module": (
        "import sys, types\n"
        "fake = types.ModuleType('unittest')\n"
        "fake.TestCase = object\n"
        "class Good:\n"
        "    def __getattr__(self, name): return lambda *a, **k: Good()\n"
        "fake.TextTestRunner = fake.defaultTestLoader = Good()\n"
        "sys.modules['unittest'] = fake\n",
        UNITTEST,
    ),
    "patches_os_and_exit": (
        "import os, sys, atexit\n"
        "os._exit = lambda code: None\nsys.exit = lambda code=0: None\n"
        "os.write = lambda *a: 0\nos.read = lambda *a: b''\n"
        "sys.excepthook = lambda *a: os.abort()\n"
        "atexit.register(lambda: print('passed'))\n",
        CHECK,
    ),
    "patches_main": (
        "import sys, __main__\n"
        "for module in list(sys.modules.values()):\n"
        "    for name in ('run_check', 'finish', 'report', 'restore', 'main', 'fail', 'compare'):\n"
        "        try: setattr(module, name, lambda *a: b'')\n"
        "        except Exception: pass\n",
        CHECK,
    ),
    "traces": (
        "import sys\n"
        "def jump(frame, event, arg):\n"
        "    if event == 'line' and frame.f_code.co_filename == '<check>':\n"
        "        frame.f_lineno = 99\n"
        "    return jump\n"
        "sys.settrace(jump)\n"
        "sys.setprofile(jump)\n",
        CHECK,
    ),
    "finalizers": (
        "import os\n"
        "class Late:\n"
        "    def __del__(self):\n"
        "        print('passed', flush=True)\n"
        "        os._exit(0)\n"
        "late = Late()\n",
        CHECK,
    ),
    "hangs_on_in_a_thread": (
        "import threading, os\n"
        "def work():\n"
        "    while True:\n"
        "        for n in range(3, 20):\n"
        "            try:\n"
        "                os.set_blocking(n, False)\n"
        "                os.write(n + 1, b'P\\x00\\x10' + os.read(n, 16))\n"
        "            except OSError: pass\n"
        "threading.Thread(target=work, daemon=True).start()\n",
        CHECK,
    ),
    "handles_signals": (
        "import signal, os\n"
        "signal.signal(signal.SIGALRM, lambda *a: os._exit(0))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.001)\n",
        "import time\ntime.sleep(0.2)\n" + CHECK,
    ),
    "changes_the_code_of_the_runner": (
        _PIPES
        + "check_pipe = sys._getframe(1).f_locals['fail'].args[0].args[1].func\n"
        + _OWN_CHECK,
        CHECK,
    ),
    "gives_an_audit_hook_a_string_of_its_own": (
        _PIPES + "class Path:\n"
        "    def __str__(self):\n"
        "        global check_pipe\n"
        "        check_pipe = sys._getframe(1).f_locals['tell'].args[1].func\n"
        "        return os.__file__\n"
        "sys.audit('import', None, Path())\n" + _OWN_CHECK,
        CHECK,
    ),
    "traces_the_end_of_tracing": (
        "import sys\n"
        "none = compile('pass', '<check>', 'exec')\n"
        "def trace(frame, event, arg):\n"
        "    name = frame.f_code.co_name\n"
        "    if name == 'announce': frame.f_locals.update(stop_tracing=(), hooks=())\n"
        "    if name == 'run_check': frame.f_locals['check'] = none\n"
        "    return trace\n"
        "sys.settrace(trace)\n",
        CHECK,
    ),
    "vetoes_hooks": (
        "import sys\n"
        "def hook(event, arguments):\n"
        "    if event == 'sys.addaudithook': raise RuntimeError\n"
        "sys.addaudithook(hook)\n"
        "def add(a, b): return sys._getframe(1).f_code.co_consts[-2]\n",
        CHECK,
    ),
    "hears_the_check_in_a_hook": (
        "import sys\n"
        "found = []\n"
        "def hook(event, arguments):\n"
        "    if event == 'exec': found[:] = arguments[0].co_consts\n"
        "sys.addaudithook(hook)\n"
        "def add(a, b): return 3 if 3 in found else 0\n",
        CHECK,
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgery_does_not_pass(sandbox: Sandbox, name: str) -> None:
    program, check = FORGERIES[name]
    outcome = sandbox.run(WRONG + program, QUICK, check=check)
    assert outcome.verdict in {
        "writes_to_all_descriptors": {Verdict.TAMPERED},
        "hangs_on_in_a_thread": {Verdict.FAILED, Verdict.TAMPERED},
        "finalizers": {Verdict.FAILED},
        "handles_signals": {Verdict.EXITED},
        "gives_an_audit_hook_a_string_of_its_own": {Verdict.TAMPERED},
        "vetoes_hooks": {Verdict.TAMPERED},
        "hears_the_check_in_a_hook": {Verdict.TAMPERED},
    }.get(name, {Verdict.FAILED}), outcome


EXCHANGES = {
    "sends_itself_another_check": (
        _PIPES + "r, w = os.pipe()\nos.write(w, own)\nos.dup2(r, source)\n"
    ),
    "listens_to_what_it_tells": _PIPES + "r, w = os.pipe()\nos.dup2(w, result)\n",
    "lets_a_copy_of_itself_tell_the_secrets": (
        _PIPES + "r, w = os.pipe(); cr, cw = os.pipe()\n"
        "def read(fd, n):\n"
        "    data = b''\n"
        "    while len(data) < n:\n"
        "        piece = os.read(fd, n - len(data))\n"
        "        if not piece: raise EOFError\n"
        "        data += piece\n"
        "    return data\n"
        "def message(fd):\n"
        "    head = read(fd, 3)\n"
        "    return head[:1], read(fd, int.from_bytes(head[1:], 'big'))\n"
        "if os.fork() == 0:\n"
        "    os.close(r); os.dup2(w, result); os.close(w); os.dup2(cr, source)\n"
        "else:\n"
        "    os.close(w)\n"
        "    kind, ready = message(r)\n"
        "    os.write(result, b'R\\x00\\x10' + ready)\n"
        "    read(source, int.from_bytes(read(source, 8), 'big'))\n"
        "    os.write(cw, own)\n"
        "    kind, proof = message(r)\n"
        "    os.write(result, kind + b'\\x00\\x10' + proof)\n"
        "    os._exit(0)\n"
    ),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_program_can_not_put_other_pipes_in_the_place_of_its_checkers(
    sandbox: Sandbox, name: str
) -> None:
    outcome = sandbox.run(WRONG + EXCHANGES[name], QUICK, check=CHECK)
    assert not outcome.passed, outcome


@pytest.mark.parametrize(
    "name", ["prints_passed", "patches_builtins", "patches_the_assert_helpers", "finalizers"]
)
def test_honest_work_passes_in_spite_of_it(sandbox: Sandbox, name: str) -> None:
    """So it is the wrong answer that failed above, and not the attempt."""
    program, check = FORGERIES[name]
    right = WRONG.replace("return 0", "return a + b")
    outcome = sandbox.run(right + program, QUICK, check=check)
    assert outcome.passed, outcome


def test_check_whose_comparison_was_exchanged_does_not_pass(sandbox: Sandbox) -> None:
    program = (
        "def generate():\n"
        "    while True:\n"
        "        frame = kept\n"
        "        while frame.f_code.co_filename != '<check>': frame = frame.f_back\n"
        "        frame.f_builtins['__compare__'] = lambda *a: True\n"
        "        yield 0\n"
        "generator = generate()\n"
        "kept = generator.gi_frame\n"
        "def add(a, b): return next(generator)\n"
    )
    assert not sandbox.run(program, QUICK, check=CHECK).passed


def test_patching_during_the_check_is_tampering(sandbox: Sandbox) -> None:
    program = (
        "import unittest\n"
        "def add(a, b):\n"
        "    unittest.TestCase.assertEqual = lambda *a, **k: None\n"
        "    return 0\n"
    )
    check = UNITTEST.replace("(add(1, 2), 3)", "(0, add(1, 2))\n        self.assertEqual(1, 3)")
    outcome = sandbox.run(program, QUICK, check=check)
    assert outcome.verdict is Verdict.TAMPERED, outcome
    assert "patched assertEqual" in outcome.detail
