"""Looks at what the checker keeps to itself: its frames and secrets, the check, its memory."""

from __future__ import annotations

import pytest

from clients.sandbox import Sandbox, Verdict
from tests.clients.sandbox.shared import CHECK, QUICK


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
