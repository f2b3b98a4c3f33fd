"""Attempts to pass without doing the work: patches, lies and forged results."""

from __future__ import annotations

import pytest

from clients.sandbox import Limits, Sandbox, Verdict

QUICK = Limits(wall_seconds=5.0, cpu_seconds=2.0)
WRONG = "def add(a, b):\n    return 0\n"
CHECK = "assert add(1, 2) == 3\n"
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
CLOSE = "assert abs(add(1, 2) - 3) < 1e-6\n"

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
    "look",
    [
        "import logging\ndef frames(): return [logging.currentframe()]\n",
        "import traceback\ndef frames(): return [f for f, _ in traceback.walk_stack(None)]\n",
    ],
)
def test_library_hands_out_no_frames_of_the_check(sandbox: Sandbox, look: str) -> None:
    program = look + (
        "def add(a, b):\n"
        "    for frame in frames():\n"
        "        while frame and frame.f_code.co_filename != '<check>': frame = frame.f_back\n"
        "        if frame: frame.f_builtins['__compare__'] = lambda *a: True\n"
        "    return 0\n"
    )
    assert not sandbox.run(program, QUICK, check=CHECK).passed


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


def test_program_that_logs_and_prints_its_stack_passes(sandbox: Sandbox) -> None:
    program = (
        "import logging, traceback\n"
        "def add(a, b):\n"
        "    logging.warning('adding %s', a)\n"
        "    traceback.print_stack()\n"
        "    return a + b\n"
    )
    assert sandbox.run(program, QUICK, check=CHECK).passed


@pytest.mark.parametrize(
    "name", ["prints_passed", "patches_builtins", "patches_the_assert_helpers", "finalizers"]
)
def test_honest_work_passes_in_spite_of_it(sandbox: Sandbox, name: str) -> None:
    """So it is the wrong answer that failed above, and not the attempt."""
    program, check = FORGERIES[name]
    right = WRONG.replace("return 0", "return a + b")
    outcome = sandbox.run(right + program, QUICK, check=check)
    assert outcome.passed, outcome


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


@pytest.mark.parametrize(
    "reach",
    [
        "import gc; gc.get_objects()",
        "import gc; gc.get_referrers(1)",
        "import sys, gc; gc.get_referents(sys._getframe(2))",
        "import ctypes",
        "import _ctypes; _ctypes.dlopen(None, 0)",
        "import sys; sys.settrace(print)",
        "import sys; sys.setprofile(print)",
        "import threading, sys; sys.settrace(lambda *a: None)",
        "import sys; sys._getframe(1).f_builtins['__compare__'] = lambda *a: True",
        "import inspect; inspect.currentframe().f_back",
        "import inspect; inspect.stack()",
        "import sys; sys._current_frames()",
        "1 / 0\n    except ZeroDivisionError as error:\n        error.__traceback__.tb_frame\n"
        "    try: pass",
        "list((f.gi_frame.f_back for f in [(x for x in [1])]))",
    ],
)
def test_means_to_forge_are_tampering_even_where_the_answer_is_right(
    sandbox: Sandbox, reach: str
) -> None:
    program = (
        f"def add(a, b):\n    try:\n        {reach}\n    except BaseException:\n        pass\n"
        "    return a + b\n"
    )
    outcome = sandbox.run(program, QUICK, check=CHECK)
    assert outcome.verdict is Verdict.TAMPERED, outcome


def test_library_looks_at_frames_for_honest_programs(sandbox: Sandbox) -> None:
    program = (
        "import collections, logging, traceback, typing, warnings\n"
        "def add(a, b):\n"
        "    collections.namedtuple('P', 'x')\n    typing.TypeVar('T')\n"
        "    logging.warning('w')\n    warnings.warn('w')\n"
        "    try:\n        1 / 0\n    except ZeroDivisionError:\n"
        "        traceback.print_exc()\n"
        "    return a + b\n"
    )
    outcome = sandbox.run(program, QUICK, check=CHECK)
    assert outcome.passed, outcome


def test_native_code_from_tmp_is_tampering(sandbox: Sandbox) -> None:
    program = (
        "import shutil, importlib.machinery, importlib.util, glob, os\n"
        "origin = glob.glob(os.path.dirname(os.__file__) + '/lib-dynload/_json*.so')\n"
        "origin += glob.glob(os.path.dirname(os.__file__) + '/lib-dynload/_bisect*.so')\n"
        "shutil.copy(origin[0], '/tmp/evil.so')\n"
        "loader = importlib.machinery.ExtensionFileLoader('evil', '/tmp/evil.so')\n"
        "importlib.util.module_from_spec(importlib.util.spec_from_loader('evil', loader))\n"
    )
    outcome = sandbox.run(program, QUICK)
    assert (outcome.verdict, outcome.detail) == (Verdict.TAMPERED, "loaded native code")


#: A look at all frames by way of a generator's own, which no audit hook guards.
_LOOK = """
found = []

def looking():
    while True:
        frame = kept
        while frame:
            found.extend(v for v in frame.f_locals.values() if type(v) is bytes and len(v) == 16)
            frame = frame.f_back
        yield

looks = looking()
kept = looks.gi_frame

def look(*_):
    next(looks)
    return look
"""
BETWEEN = {
    "tracing": "import sys\nsys.settrace(look)\n",
    "profiling": "import sys\nsys.setprofile(look)\n",
    "a_debugger": (
        "import bdb\n"
        "class Debugger(bdb.Bdb):\n    user_call = user_line = look\n"
        "Debugger().set_trace()\n"
    ),
    "the_collector": "import gc\ngc.callbacks.append(look)\ngc.set_threshold(1)\n",
    "a_metaclass_of_what_was_patched": (
        "import os\n"
        "class Meta(type):\n"
        "    def __getattribute__(cls, name):\n"
        "        look()\n"
        "        return super().__getattribute__(name)\n"
        "class Odd(metaclass=Meta): pass\n"
        "os.odd = Odd()\n"
    ),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_no_code_of_the_programs_sees_a_secret_between_it_and_its_check(
    sandbox: Sandbox, name: str
) -> None:
    program = "def add(a, b):\n    print(len(found))\n    return a + b\n" + _LOOK + BETWEEN[name]
    outcome = sandbox.run(program, QUICK, check=CHECK)
    assert outcome.passed, outcome
    assert outcome.stdout == "0\n"


def test_frames_and_tracebacks_lead_to_no_secret(sandbox: Sandbox) -> None:
    """No frame's names, seen from the check's calls, hold bytes like the secrets.

    The frames are reached through a door that no audit hook guards: a generator's own, kept.
    """
    program = """
import sys

def reachable(value, depth=0, seen=None):
    seen = set() if seen is None else seen
    if id(value) in seen or depth > 12:
        return
    seen.add(id(value))
    yield value
    inner = []
    if isinstance(value, dict):
        inner += [*value.keys(), *value.values()]
    elif type(value).__name__ == "FrameLocalsProxy":  # from Python 3.13 on
        inner += [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner += value
    for name in ("__dict__", "__closure__", "__globals__", "__defaults__", "__kwdefaults__",
                 "__code__", "co_consts", "args", "func", "keywords", "__self__", "f_locals",
                 "f_globals", "f_back", "f_code", "cell_contents"):
        try:
            inner.append(getattr(value, name))
        except Exception:
            pass
    for one in inner:
        yield from reachable(one, depth + 1, seen)

def look():
    while True:
        yield list(reachable(kept))

looking = look()
kept = looking.gi_frame

def add(a, b):
    sys.setrecursionlimit(10000)
    everything = next(looking)
    secrets = {one for one in everything if type(one) is bytes and len(one) == 16}
    print(len(everything) > 1000, secrets - {b"MALLOC_ARENA_MAX"})
    functions = {one.__name__ for one in everything if type(one) is type(add)}
    ways = {"report", "write_message", "check_pipe", "finish", "receive", "read_exactly"}
    print(sorted(functions & ways))
    return a + b

add(1, 2)
"""
    outcome = sandbox.run(program, QUICK, check=CHECK)
    assert outcome.passed, outcome
    # While it is checked it may reach what tells of a failure, and none of it brings a pass.
    while_checked = "['check_pipe', 'report', 'write_message']"
    assert outcome.stdout == f"True set()\n[]\nTrue set()\n{while_checked}\n"


def test_check_is_unknown_to_the_program(sandbox: Sandbox) -> None:
    program = (
        "import os, sys\n"
        "found = []\n"
        "for n in range(3, 32):\n"
        "    try:\n"
        "        os.set_blocking(n, False)\n"
        "        found.append(os.read(n, 1 << 16))\n"
        "    except OSError:\n"
        "        pass\n"
        "    try: os.set_blocking(n, True)\n"
        "    except OSError: pass\n"
        "assert not any(b'SECRET' in one for one in found)\n"
    )
    outcome = sandbox.run(program, QUICK, check="assert 'SECRET'\n")
    assert outcome.passed, outcome


def test_memory_of_the_runner_is_closed_to_its_children(sandbox: Sandbox) -> None:
    """A child interpreter has no audit hooks; the kernel says no in their place."""
    child = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.ptrace(16, os.getppid(), 0, 0), ctypes.get_errno())\n"
        "b = ctypes.create_string_buffer(8)\n"
        "class V(ctypes.Structure):\n"
        "    _fields_ = [('base', ctypes.c_void_p), ('len', ctypes.c_size_t)]\n"
        "v = V(ctypes.addressof(b), 8)\n"
        "print(libc.process_vm_readv(os.getppid(), ctypes.byref(v), 1, ctypes.byref(v), 1, 0),\n"
        "      ctypes.get_errno())\n"
        "print(os.path.exists(f'/proc/{os.getppid()}/mem'))\n"
    )
    program = (
        "import subprocess, sys\n"
        f"print(subprocess.run([sys.executable, '-I', '-S', '-c', {child!r}],"
        " capture_output=True, text=True))\n"
    )
    outcome = sandbox.run(program, QUICK)
    assert outcome.passed, outcome
    assert r"-1 1\n-1 1\nFalse\n" in outcome.stdout, outcome.stdout


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
