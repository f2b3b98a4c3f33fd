"""Attacks from inside: all are contained, and all are reported as what they are."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients.sandbox import Limits, Outcome, Sandbox, Verdict
from tests.clients.sandbox.parallel import run_many
from tests.clients.sandbox.shared import CHECK, QUICK


def depth(process: Path) -> int:
    """How many namespaces of processes one is in, each inside the other; 0 where it has ended."""
    try:
        lines = (process / "status").read_text("utf-8", "replace").splitlines()
    except OSError:
        return 0
    return next((len(line.split()) - 1 for line in lines if line.startswith("NSpid:")), 0)


def sandboxes() -> set[str]:
    """The namespaces of all processes in sandboxes, whatever they run."""
    ours = depth(Path("/proc/self"))
    found = (path for path in Path("/proc").iterdir() if path.name.isdigit())
    return {namespace(path) for path in found if depth(path) > ours}


def namespace(process: Path) -> str:
    """The one that a process is in; of its own where that is a secret."""
    try:
        return os.readlink(process / "ns/pid")
    except OSError:
        return process.name


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After every attack all its processes are gone."""
    before = sandboxes()
    yield
    # Those of other runs on this machine come and go.
    left = sandboxes() - before
    deadline = time.monotonic() + 5
    while left := left & sandboxes():
        assert time.monotonic() < deadline, f"processes survive the run: {left}"
        time.sleep(0.02)


def blocked(outcome: Outcome, *names: str) -> None:
    """The program tried, got one of these exceptions, and was told so."""
    assert outcome.verdict is Verdict.FAILED, outcome
    assert outcome.detail.startswith(names), outcome


# Resources


def test_fork_bomb_hits_the_limit_of_processes(sandbox: Sandbox) -> None:
    program = "import os\nwhile True:\n    os.fork()\n"
    outcome = sandbox.run(program, Limits(wall_seconds=3, processes=16))
    blocked(outcome, "BlockingIOError")


def test_fork_bomb_that_ignores_the_limit_is_timed_out(sandbox: Sandbox) -> None:
    program = (
        "import os\n"
        "most = 0\n"
        "for _ in range(200):\n"
        "    try:\n"
        "        if os.fork() == 0:\n"
        "            while True: pass\n"
        "        most += 1\n"
        "    except OSError:\n"
        "        pass\n"
        "print(most, flush=True)\n"
        "while True: pass\n"
    )
    outcome = sandbox.run(program, Limits(wall_seconds=1.5, processes=16))
    assert outcome.verdict is Verdict.TIMED_OUT
    assert outcome.stdout == "15\n"


def test_limit_of_processes_counts_each_run_apart(sandbox: Sandbox) -> None:
    """Parallel runs do not eat each other's processes."""
    program = (
        "import os, time\n"
        "for _ in range(6):\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(20)\n"
        "time.sleep(0.5)\n"
    )
    outcomes = run_many(sandbox, [(program, None)] * 6, Limits(processes=8), workers=6)
    assert [outcome.verdict for outcome in outcomes] == [Verdict.PASSED] * 6


@pytest.mark.parametrize(
    "program",
    [
        "x = []\nwhile True:\n    x.append(bytearray(1 << 24))\n",
        "x = 'a' * (1 << 40)\n",
    ],
)
def test_memory_bomb_is_out_of_memory(sandbox: Sandbox, program: str) -> None:
    outcome = sandbox.run(program, Limits(memory_bytes=256 << 20))
    assert outcome.verdict is Verdict.OUT_OF_MEMORY


def test_memory_bomb_of_many_processes_is_out_of_memory(sandbox: Sandbox) -> None:
    """Each stays below the limit of its own."""
    program = (
        "import os, time\n"
        "for _ in range(8):\n"
        "    if os.fork() == 0:\n"
        "        x = bytearray(b'x') * (100 << 20)\n"
        "        time.sleep(20)\n"
        "time.sleep(20)\n"
    )
    outcome = sandbox.run(program, Limits(memory_bytes=256 << 20))
    assert outcome.verdict is Verdict.OUT_OF_MEMORY
    assert "256 MB" in outcome.detail


def test_memory_that_belongs_to_no_process_is_denied(sandbox: Sandbox) -> None:
    program = (
        "import os\n"
        "held = [os.memfd_create(str(n)) for n in range(10)]\n"
        "for one in held:\n"
        "    os.write(one, bytes(15 << 20))\n"
    )
    blocked(sandbox.run(program, Limits(memory_bytes=100 << 20)), "PermissionError")
    calls = {"x86_64": (319, 447, 29), "aarch64": (279, 447, 194)}[platform.machine()]
    child = (
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"for call in {calls}:\n"
        "    print(libc.syscall(call, 0, 1 << 20, 0o1600), ctypes.get_errno())\n"
    )
    program = (
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-I', '-S', '-c', {child!r}])\n"
    )
    assert sandbox.run(program, QUICK).stdout == "-1 1\n" * 3


def test_process_may_have_any_name(sandbox: Sandbox) -> None:
    """It stands in what the limits of memory and time are told from."""
    program = (
        "import os\n"
        "os.symlink('/bin/sleep', b'/tmp/\\xff')\n"
        "if os.fork() == 0:\n"
        "    os.execv(b'/tmp/\\xff', ['sleep', '9'])\n"
        "os.wait()\n"
    )
    outcome = sandbox.run(program, Limits(wall_seconds=0.6))
    assert outcome.verdict is Verdict.TIMED_OUT


def test_forks_share_memory_without_being_charged_twice(sandbox: Sandbox) -> None:
    program = (
        "import os, time\n"
        "x = bytearray(b'x') * (100 << 20)\n"
        "children = [os.fork() for _ in range(1)]\n"
        "for _ in range(4):\n"
        "    if children[-1]:\n"
        "        children.append(os.fork())\n"
        "if children[-1] == 0:\n"
        "    time.sleep(0.4)\n"
        "    os._exit(0)\n"
        "for child in children:\n"
        "    os.waitpid(child, 0)\n"
    )
    outcome = sandbox.run(program, Limits(memory_bytes=256 << 20))
    assert outcome.verdict is Verdict.PASSED, outcome


def test_endless_loop_ends_at_the_cpu_limit(sandbox: Sandbox) -> None:
    outcome = sandbox.run("while True: pass", Limits(wall_seconds=20, cpu_seconds=1))
    assert (outcome.verdict, outcome.detail) == (Verdict.TIMED_OUT, "CPU time limit of 1 s")
    assert outcome.seconds < 15


def test_endless_loop_that_ignores_the_signal_ends_at_the_cpu_limit(sandbox: Sandbox) -> None:
    program = (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass\n"
    )
    outcome = sandbox.run(program, Limits(wall_seconds=20, cpu_seconds=1))
    assert (outcome.verdict, outcome.detail) == (Verdict.TIMED_OUT, "CPU time limit of 1 s")


def test_endless_sleep_ends_at_the_wall_limit(sandbox: Sandbox) -> None:
    outcome = sandbox.run("import time\ntime.sleep(60)", Limits(wall_seconds=0.5))
    assert (outcome.verdict, outcome.detail) == (Verdict.TIMED_OUT, "wall time limit of 0.5 s")
    assert outcome.seconds < 5


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output_is_cut_at_its_limit(sandbox: Sandbox, stream: str) -> None:
    program = f"import sys\nwhile True:\n    sys.{stream}.write('spam ' * 1000)\n"
    outcome = sandbox.run(program, Limits(output_bytes=10_000))
    assert outcome.verdict is Verdict.OUTPUT_LIMIT
    assert len(getattr(outcome, stream)) == 10_000


def test_files_are_limited_one_by_one_and_together(sandbox: Sandbox) -> None:
    limits = Limits(file_bytes=1 << 20)
    one = "open('/tmp/a', 'wb').write(bytes(2 << 20))"
    blocked(sandbox.run(one, limits), "OSError: [Errno 27]")
    many = "for i in range(9):\n    open(f'/tmp/{i}', 'wb').write(bytes(1 << 19))\n"
    blocked(sandbox.run(many, limits), "OSError: [Errno 28]")
    blocked(sandbox.run(many.replace("/tmp", "/dev/shm"), limits), "OSError: [Errno 28]")


THREADS = "import threading, time\ndef work():\n    while True: time.sleep(0.01)\n"


def test_thread_that_never_ends_is_timed_out(sandbox: Sandbox) -> None:
    program = THREADS + "threading.Thread(target=work).start()\n"
    assert sandbox.run(program, Limits(wall_seconds=1)).verdict is Verdict.TIMED_OUT


def test_daemon_threads_end_with_the_program(sandbox: Sandbox) -> None:
    program = THREADS + "for _ in range(5): threading.Thread(target=work, daemon=True).start()\n"
    assert sandbox.run(program, QUICK).passed


# The world outside


def test_network_is_out_of_reach(sandbox: Sandbox) -> None:
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]

        def listen() -> None:
            with contextlib.suppress(TimeoutError):
                heard.append(server.accept())

        listener = threading.Thread(target=listen)
        listener.start()
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\n"
        blocked(sandbox.run(program, QUICK), "ConnectionRefusedError")
        listener.join()
    assert not heard
    # 192.0.2.1 is reserved for documentation; without an interface nothing can be sent at all.
    outside = "import socket\nsocket.create_connection(('192.0.2.1', 80), 1)\n"
    blocked(sandbox.run(outside, QUICK), "OSError: [Errno 101] Network is unreachable")
    names = "import socket\nprint([name for _, name in socket.if_nameindex()])\n"
    assert sandbox.run(names, QUICK).stdout == "['lo']\n"


def test_abstract_sockets_of_the_host_are_out_of_reach(sandbox: Sandbox) -> None:
    name = f"\0ponderttt-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        program = f"import socket\nsocket.socket(socket.AF_UNIX).connect({name!r})\n"
        blocked(sandbox.run(program, QUICK), "ConnectionRefusedError")


def test_secrets_of_the_host_are_out_of_reach(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for path in ("/etc/shadow", "/etc/passwd", str(secret), "/proc/1/environ", "/sys/kernel"):
        blocked(sandbox.run(f"open({path!r}).read()", QUICK), "FileNotFoundError")
    home = Path.home()
    program = f"import os\nprint(os.listdir({str(home)!r}))"
    outcome = sandbox.run(program, QUICK)
    # Of the home directory there is at most the way to the interpreter.
    seen = set(eval(outcome.stdout)) if outcome.passed else set()
    assert len(seen) <= 1, seen
    assert outcome.passed or outcome.detail.startswith("FileNotFoundError")


def test_environment_is_not_the_hosts(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "secret")
    outcome = sandbox.run("import os\nprint(sorted(os.environ), os.getcwd())", QUICK)
    assert "API_TOKEN" not in outcome.stdout
    assert outcome.stdout == "['HOME', 'LANG', 'MALLOC_ARENA_MAX', 'PATH', 'PWD'] /tmp\n"


def test_open_descriptors_of_the_host_are_not_inherited(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    with secret.open() as file:
        os.set_inheritable(file.fileno(), True)
        program = (
            "import os, stat\n"
            "for n in range(256):\n"
            "    try: mode = os.fstat(n).st_mode\n"
            "    except OSError: continue\n"
            "    print('file' if stat.S_ISREG(mode) else 'other')\n"
        )
        outcome = sandbox.run(program, QUICK)
    assert outcome.passed
    assert "file" not in outcome.stdout


@pytest.mark.parametrize(
    "path", ["/x", "/usr/x", "/etc/x", "/dev/x", "/runner.py", os.__file__, str(Path.home() / "x")]
)
def test_nothing_outside_tmp_can_be_written(sandbox: Sandbox, path: str) -> None:
    outcome = sandbox.run(f"open({path!r}, 'a').write('x')", QUICK)
    blocked(outcome, "OSError", "PermissionError", "FileNotFoundError")


def test_tmp_is_private_and_new(sandbox: Sandbox) -> None:
    program = "import os\nassert os.listdir('/tmp') == []\nopen('/tmp/x', 'w').write('x')\n"
    assert [sandbox.run(program, QUICK).verdict for _ in range(2)] == [Verdict.PASSED] * 2
    assert not Path("/tmp/x").exists()


# Signals and the end of the process


@pytest.mark.parametrize(
    "target", ["os.getppid()", "-1", "0", "1", "-os.getppid()"], ids=str
)  # fmt: skip
def test_signals_reach_nobody_outside(sandbox: Sandbox, target: str) -> None:
    """The program's parent inside is an init that the kernel shields; we are not to be seen."""
    ours: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: ours.append(number))
    try:
        for number in ("SIGUSR1", "SIGKILL"):
            program = (
                "import os, signal\n"
                "try:\n"
                f"    os.kill({target}, signal.{number})\n"
                "except OSError:\n"
                "    pass\n"
                "raise ValueError('still there')\n"
            )
            outcome = sandbox.run(program, QUICK)
            assert outcome.verdict in (Verdict.FAILED, Verdict.KILLED), outcome
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert ours == []


def test_signal_to_itself_is_reported_as_killed(sandbox: Sandbox) -> None:
    outcome = sandbox.run("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", QUICK)
    assert (outcome.verdict, outcome.detail) == (Verdict.KILLED, "by SIGSEGV")


@pytest.mark.parametrize("code", [0, 1, 77])
def test_os_exit_is_reported_as_exited(sandbox: Sandbox, code: int) -> None:
    for program, check in (
        (f"import os\nos._exit({code})", None),
        (f"import os\nos._exit({code})", CHECK),
        (f"import os\ndef add(a, b):\n    os._exit({code})", CHECK),
    ):
        outcome = sandbox.run(program, QUICK, check=check)
        assert outcome.verdict is Verdict.EXITED
        assert outcome.detail == f"with code {code} before the program's end"


@pytest.mark.parametrize(
    "way", ["sys.exit(0)", "raise SystemExit", "exit_()", "raise KeyboardInterrupt"]
)
def test_leaving_early_is_failing(sandbox: Sandbox, way: str) -> None:
    program = f"import sys\nexit_ = sys.exit\ndef add(a, b):\n    {way}\n"
    blocked(sandbox.run(program, QUICK, check=CHECK), "SystemExit", "KeyboardInterrupt")
    blocked(sandbox.run(program + "add(1, 2)\n", QUICK), "SystemExit", "KeyboardInterrupt")


def test_exec_of_another_program_is_no_end(sandbox: Sandbox) -> None:
    program = "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'pass'])"
    assert sandbox.run(program, QUICK).verdict is Verdict.EXITED
