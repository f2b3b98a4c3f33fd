"""Runs inside the sandbox: the trusted half of an interpreter that then runs untrusted code.

Started as `python -I -S -B runner.py IN OUT UID CPU MEMORY PROCESSES FILE MODULES`. Needs only the
standard library and imports nothing of ours.

**How passing is proved.** The host sends two secrets. Each is given back after a part of the
program has run to its real end: the first after the program (the host answers with the check), the
second after the check. Untrusted code shares this process, so the question is whether it can get
at a secret early. Not through a name: from the moment untrusted code runs, the secrets lie only on
the evaluation stack of `main`, as operands of an expression in progress, and so do the functions
that are yet to be called. No local, closure, module or global holds them, so neither frames nor
tracebacks lead to them, and patching whatever can be found changes nothing that counts. The rest is
refused by audit hooks, which can't be removed and are there before untrusted code: the garbage
collector's search for objects, other threads' frames, hooks of the program's own (they would be
told the check's code), and native code.

Between the program and its check none of the program's code may run, since a frame with a secret is
there to be seen: tracing is ended by functions written in C, which aren't traced, then patches are
undone, then signal handlers and the garbage collector, which calls finalizers, are put to rest.

While the check runs, tracing is refused (it could jump over the check's lines), and only the
standard library may look at frames, where the expected values are.

The pipes are known by their identity, not by their numbers alone, and only this process uses them.

What remains possible: bugs of the interpreter, crafted bytecode among them; code that disguises
itself as the library's to look at the check's frames, or that reaches them from a frame of a
generator which it kept from before, and copies the expected values or the check's names from
there; a signal handler, which is given the frame that it interrupts; code that finds the check's
classes among the subclasses of the library's; a metaclass whose methods run when patches are undone
and keep one of them; results that lie within the language's rules where `compare` doesn't look: in
chains whose later operands are more than constants, in methods of `unittest` that are given their
arguments by name or are not in `checks._ASSERTIONS`, in functions of the library, in an order that
is denied (`if x > 1: raise`) and in the truth of a result; a patch of the library that is made and
undone while the check runs; a thread that exchanges a pipe just between a look at it and its use,
or traces this one just before it may not. None of that happens by accident.

A message to the host is a kind, the length of its text (2 bytes) and the text. The first one says
that all is ready for the program: what happens before it is not the program's doing.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import builtins
import gc
import marshal
import operator
import os
import resource
import sys
from _thread import get_ident
from collections.abc import Callable, Mapping
from functools import partial
from types import CodeType, FunctionType, ModuleType, TracebackType
from typing import Any

Tell = Callable[[bytes, bytes], None]
#: Per module and class: its attributes (a live view), how to set and how to delete one, the
#: callables that it held, and whether it is a class. Of a module also whatever has the name of a
#: built-in one.
Kept = list[tuple[Mapping[str, Any], Callable[..., Any], Callable[..., Any], dict[str, Any], bool]]

SECRET_BYTES = 16
#: Names of the program's module.
OURS = frozenset({"program", "__main__"})
#: Py_TPFLAGS_HEAPTYPE
HEAP_TYPE = 1 << 9
#: Ways to objects that no name leads to, or to be told of what others do; nothing that a benchmark
#: asks for needs them.
SEARCHES = frozenset({
    "gc.get_objects", "gc.get_referents", "gc.get_referrers", "sys._current_frames",
    "sys._current_exceptions", "sys.addaudithook", "sys.monitoring.register_callback",
})  # fmt: skip
TRACING = frozenset({"sys.settrace", "sys.setprofile"})
#: Ways to a frame; those of the check hold its expected values and its own names.
FRAMES = frozenset({"sys._getframe", "tb_frame", "gi_frame", "cr_frame", "ag_frame"})
#: What the import system writes into modules, also of its own accord and late.
METADATA = frozenset({"__doc__", "__loader__", "__name__", "__package__", "__spec__"})
COMPARISONS = {
    "__eq__": operator.eq,
    "__lt__": operator.lt,
    "__le__": operator.le,
    "__gt__": operator.gt,
    "__ge__": operator.ge,
    "__ne__": operator.ne,
}
PLAIN = frozenset(
    {bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple, type(None)}
)


def main() -> None:
    """Run what comes through IN; the evaluation order of the last expression is the point."""
    steps, secrets, program = prepare()
    for name in [name for name in globals() if not name.startswith("__")]:
        del globals()[name]
    step, secret = steps.pop, secrets.pop
    # Python evaluates operands from the left: every function and both secrets are taken out of
    # their lists, and are on the evaluation stack, before the innermost call runs the program.
    # fmt: off
    step()(secret(), step()(step()(step()(secret(),
        step()(step()(step()(step()(step()(step()(step()(step()(program))))))))))))
    # fmt: on


def prepare() -> tuple[list[Callable[..., Any]], list[bytes], bytes]:
    """Confine this process; returns the steps (the last one comes first), secrets and program."""
    source, result, uid, *amounts = map(int, sys.argv[1:8])
    modules = sys.argv[8].split(",") if sys.argv[8] else []
    confine(uid, *amounts)
    for descriptor in (source, result):
        os.set_inheritable(descriptor, False)
    pipe_checks = [
        partial(check_pipe, os.fstat, os.getpid, os._exit, pipe_identity(number), number)
        for number in (result, source)
    ]
    tell = partial(write_message, os.write, pipe_checks[0], result)
    take = partial(read_exactly, os.read, pipe_checks[1], source)
    for name in modules:  # what the check will need, while it is still unpatched
        try:  # noqa: SIM105 (contextlib costs half a millisecond)
            __import__(name)
        except ImportError:
            pass
    namespace = program_module()
    secrets = [take(SECRET_BYTES), take(SECRET_BYTES)]
    program = take(int.from_bytes(take(8), "big"))
    kept = keep_callables()
    put_back = partial(restore, frozenset(vars(builtins)) - METADATA, kept)
    flush = partial(flush_all, (sys.stdout.flush, sys.stderr.flush))
    # Found by the check only, not by the program, which can patch the module `builtins`.
    pristine = dict(vars(builtins))
    vouch = partial(
        refuse_lies, frozenset(COMPARISONS), PLAIN, HEAP_TYPE, tell, os._exit, sys.modules
    )
    pristine["__compare__"] = partial(compare, COMPARISONS, operator.contains, vouch)
    pristine["__assertion__"] = partial(assertion, vouch)
    fail = partial(report, tell, os._exit, flush, sys.__excepthook__)
    errors: list[BaseException | None] = []
    checking: list[None] = []
    handlers: list[tuple[int, Any]] = []
    sys.addaudithook(
        partial(
            refuse_looks,
            tell,
            os._exit,
            TRACING,
            FRAMES,
            checking,
            sys._getframe,
            get_ident,
            set(),
            (*prefixes(), __file__),
        )
    )
    sys.addaudithook(partial(refuse, tell, os._exit, SEARCHES, prefixes(), FunctionType, __file__))
    steps: list[Callable[..., Any]] = [
        partial(run_program, compile, exec, namespace),
        # These three are written in C, return None and take it: tracing ends before there is
        # anything worth to be traced.
        errors.append,
        sys.settrace,
        sys.setprofile,
        partial(settle, errors, fail),
        put_back,
        partial(hush, _signal.getsignal, _signal.signal, _signal.SIG_IGN, handlers, gc.disable),
        checking.append,
        partial(announce, tell),
        partial(receive, tell, take, marshal.loads),
        partial(
            run_check,
            exec,
            namespace,
            pristine,
            tuple(pristine.items()),
            sys.modules,
            fail,
            flush,
            partial(wake, _signal.signal, handlers, gc.enable),
        ),
        partial(finish, tell, put_back, os._exit),
    ]
    tell(b"S", b"")
    return steps, secrets, program


def confine(uid: int, cpu: int, memory: int, processes: int, file: int) -> None:
    """Set the limits of this process, which all that it starts inherit; drop to `uid` unless 0."""
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    # The soft limit ends the program; the hard one those that ignore its signal.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    if uid:
        # The kernel never limits the processes of its user 0.
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    if processes:
        resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))


def pipe_identity(descriptor: int) -> tuple[int, int, int]:
    """Tells the pipe behind a descriptor from any other, and this process from its copies."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, os.getpid()


def program_module() -> dict[str, Any]:
    """The global names of the program; pickling and dataclasses find them by the module's name."""
    module = ModuleType("program")
    sys.modules["program"] = sys.modules["__main__"] = module
    sys.argv[:] = ["program.py"]
    namespace = vars(module)
    namespace["__builtins__"] = builtins
    return namespace


def keep_callables() -> Kept:
    """What the loaded modules and their classes hold, as far as it can be called."""
    modules = {name: module for name, module in sys.modules.items() if name not in OURS}
    loaded = {one for one in modules.values() if type(one) is ModuleType} - {builtins}
    # The built-in functions come first: putting back the rest needs them.
    holders = [vars(builtins), *map(vars, loaded)]
    built_in = frozenset(holders[0]) - METADATA
    kept: Kept = [
        (one, one.__setitem__, one.__delitem__, callables(one, built_in, METADATA), False)
        for one in holders
    ]
    kept.append((sys.modules, sys.modules.__setitem__, sys.modules.__delitem__, modules, False))
    for kind in {one for names in holders for one in names.values() if isinstance(one, type)}:
        if kind.__flags__ & HEAP_TYPE:  # classes written in C can't be patched
            put, delete = partial(type.__setattr__, kind), partial(type.__delattr__, kind)
            kept.append((vars(kind), put, delete, callables(vars(kind)), True))
    return kept


def callables(
    attributes: Mapping[str, Any],
    others: frozenset[str] = frozenset(),
    ignored: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Functions, classes, methods and properties, and the `others`."""
    return {
        name: value
        for name, value in attributes.items()
        if (callable(value) or hasattr(type(value), "__get__") or name in others)
        and name not in ignored
    }


def prefixes() -> tuple[str, ...]:
    """Directories from which extension modules may be loaded: the standard library's."""
    return tuple({f"{os.path.dirname(os.__file__)}/", f"{sys.base_exec_prefix}/lib"})


# The functions below get all that they use as arguments: by the time they are called, nothing that
# can be reached by a name is to be trusted.


def check_pipe(
    fstat: Any, getpid: Any, exit_: Any, known: tuple[int, int, int], descriptor: int
) -> None:
    """End a process that has put another pipe in the place of ours, and copies of the process."""
    try:
        status = fstat(descriptor)
    except OSError:
        exit_(1)
    if (status.st_dev, status.st_ino, getpid()) != known:
        exit_(1)


def read_exactly(read: Any, check: Any, descriptor: int, count: int) -> bytes:
    """`count` bytes; an error where the stream ends before."""
    data = b""
    while len(data) < count:
        check()
        piece = read(descriptor, count - len(data))
        if not piece:
            raise EOFError("the host hung up")
        data += piece
    return data


def write_message(write: Any, check: Any, descriptor: int, kind: bytes, text: bytes) -> None:
    """Short enough to be written in one piece."""
    check()
    write(descriptor, kind + len(text).to_bytes(2, "big") + text)


def run_program(compile_: Any, exec_: Any, namespace: Any, program: bytes) -> BaseException | None:
    """The error that the program ends with; it can reach this frame, where nothing is of use."""
    try:
        exec_(compile_(program, "<program>", "exec", 0, True), namespace)
    except BaseException as error:
        return error
    return None


def settle(errors: list[BaseException | None], fail: Any, _: None) -> None:
    """Tell how the program failed, if it did, and end."""
    error = errors[0]
    if error is not None:
        fail(error)
        raise error


def hush(
    getsignal: Any, set_signal: Any, ignore: Any, handlers: list[tuple[int, Any]], stop: Any, _: str
) -> None:
    """Let no signal and no garbage collection call the program's code for a while."""
    for number in range(1, 65):
        handler = getsignal(number)
        if callable(handler):
            handlers.append((number, handler))
            set_signal(number, ignore)
    stop()


def wake(set_signal: Any, handlers: list[tuple[int, Any]], collect: Any) -> None:
    """Undo `hush`."""
    for number, handler in handlers:
        set_signal(number, handler)
    collect()


def announce(tell: Tell, secret: bytes, _: None) -> None:
    """Tell that the program ran to its end."""
    tell(b"R", secret)


def receive(tell: Tell, take: Any, loads: Any, _: None) -> CodeType:
    try:
        return loads(take(int.from_bytes(take(8), "big")))
    except BaseException:
        tell(b"T", b"took what was sent to its checker")
        raise


def run_check(
    exec_: Any, namespace: dict[str, Any], pristine: dict[str, Any], known: tuple[Any, ...],
    modules: dict[str, Any], fail: Any, flush: Any, wake_: Any, check: CodeType,
) -> None:  # fmt: skip
    """Run the check with the program's names but its own built-in functions; wait for threads."""
    try:
        wake_()
        exec_(check, {**namespace, "__builtins__": pristine})
        if threading := modules.get("threading"):
            for thread in threading.enumerate():
                if thread is not threading.main_thread() and not thread.daemon:
                    thread.join()
        if len(pristine) != len(known) or any(pristine.get(k) is not v for k, v in known):
            raise RuntimeError("the check's built-in functions were exchanged")
        flush()
    except BaseException as error:
        fail(error)
        raise


def finish(tell: Tell, put_back: Any, exit_: Any, proof: bytes, _: None) -> None:
    """Prove it, and end without running anything that the program has left behind."""
    if patched := put_back():
        tell(b"T", f"patched {patched} while it was checked".encode()[:400])
    tell(b"P", proof)
    exit_(0)


def restore(built_in: frozenset[str], kept: Kept, _: None = None) -> str:
    """Put back what was patched; returns the name of one such thing, or nothing."""
    patched = ""
    for attributes, put, delete, names, is_class in kept:
        for name, value in names.items():
            if attributes.get(name) is not value:
                patched = name
                put(name, value)
        # New names can hide a base's method or a built-in function.
        for name in [*attributes]:
            if name in names:
                continue
            value = attributes[name]
            hides = callable(value) or hasattr(type(value), "__get__")
            if hides if is_class else name in built_in:
                patched = name
                delete(name)
    return patched


# Programs can call the audit hooks with arguments of their own (`sys.audit`), whose methods would
# run with the hook's frame in reach; so only what is exactly a string is asked anything.


def refuse(
    tell: Tell, exit_: Any, events: frozenset[str], paths: tuple[str, ...], function: type,
    own: str, event: str, arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    """Audit hook; ends the process rather than raising, so that nothing of it can be caught."""
    if event in events or event.startswith("ctypes."):
        tell(b"T", b"used " + event.encode())
        exit_(1)
    elif event == "import" and arguments[1] is not None:
        path = arguments[1]
        if type(path) is not str or not path.startswith(paths) or ".." in path:
            tell(b"T", b"loaded native code")
            exit_(1)
    elif event == "object.__setattr__" and type(arguments[0]) is function:
        home = arguments[0].__code__.co_filename  # type: ignore[attr-defined]
        if type(home) is str and home == own:
            tell(b"T", b"patched its checker")
            exit_(1)


def refuse_looks(
    tell: Tell, exit_: Any, tracing: frozenset[str], ways: frozenset[str], checking: list[None],
    getframe: Any, ident: Any, busy: set[int], library: tuple[str, ...],
    event: str, arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    """Audit hook of the check's time: nobody may trace, and only the library look at frames."""
    if not checking:
        return
    if event in tracing:
        tell(b"T", b"used " + event.encode())
        exit_(1)
    way = arguments[1] if event == "object.__getattr__" else event
    thread = ident()
    if type(way) is not str or way not in ways or thread in busy:
        return
    busy.add(thread)  # to ask who it was raises the same event
    frame = getframe(1)
    caller, asker = frame.f_code.co_filename, frame.f_back
    busy.discard(thread)
    for_others = (
        type(caller) is not str
        or caller.endswith("/inspect.py")
        or (
            # These hand frames out, where others ask than the library itself.
            (caller.endswith("/logging/__init__.py") or frame.f_code.co_name == "walk_stack")
            and asker is not None
            and not asker.f_code.co_filename.startswith(library)
        )
    )
    if caller != "<check>" and (not caller.startswith(library) or for_others):
        tell(b"T", b"looked at the frames of its checker")
        exit_(1)


def compare(
    comparisons: dict[str, Any], contains: Any, vouch: Any, methods: tuple[str, ...], left: Any,
    *others: Any,
) -> Any:  # fmt: skip
    """A comparison in the check, or a chain of them."""
    answer: Any = True
    for method, right in zip(methods, others, strict=True):
        if method in ("in", "not in"):
            claimed = contains(right, left)
            answer = claimed if method == "in" else not claimed
        else:
            answer = comparisons[method](left, right)
            claimed = not answer if method == "__ne__" else answer
        if claimed:
            vouch(method, left, right)
        if len(methods) > 1 and not answer:
            break
        left = right
    return answer


def assertion(
    vouch: Any, method: str, assert_: Any, left: Any, right: Any, *rest: Any, **named: Any
) -> Any:
    """A call of a method of `unittest` that returns if its arguments compare so."""
    answer = assert_(left, right, *rest, **named)
    vouch(method, left, right)
    return answer


def refuse_lies(
    comparisons: frozenset[str], plain: frozenset[type], heap_type: int, tell: Tell, exit_: Any,
    modules: dict[str, Any], method: str, left: Any, right: Any,
) -> None:  # fmt: skip
    """End a process whose comparison held by the program's own say-so, which is no comparison.

    A value whose class the program has defined, with comparisons of its own, may say that it
    equals the plain value that the check expects, or one in the plain collection.
    """

    def is_plain(kind: type) -> bool:
        return any(kind is one for one in plain)

    def own(value: Any, depth: int = 0) -> bool:
        kind = type(value)
        if is_plain(kind):
            if depth > 8 or kind in (str, bytes, int, float, bool, complex, type(None)):
                return False
            inner = (*value.keys(), *value.values()) if kind is dict else value
            return any(own(one, depth + 1) for one in inner)
        for base in type.__dict__["__mro__"].__get__(kind):
            names = type.__dict__["__dict__"].__get__(base)
            if not comparisons.isdisjoint(names.keys()):
                if not type.__dict__["__flags__"].__get__(base) & heap_type:
                    return False  # written in C
                home = modules.get(names.get("__module__", ""))
                return getattr(home, base.__name__, None) is not base or home is modules["program"]
        return False

    # What a collection of the program's own has is its affair.
    expected = (right,) if method in ("in", "not in") else (left, right)
    if any(is_plain(type(one)) for one in expected) and own(left) != own(right):
        tell(b"T", f"a result compares with {method} of its own".encode())
        exit_(1)


def flush_all(flush: Any) -> None:
    """Write out what the program has printed."""
    for one in flush:
        try:  # noqa: SIM105
            one()
        except (OSError, ValueError):  # the program closed it
            pass


def report(tell: Tell, exit_: Any, flush: Any, show: Any, error: BaseException) -> None:
    """Tell of an exception, show its traceback, and end."""
    if isinstance(error, MemoryError):
        tell(b"M", b"MemoryError")
        exit_(1)
    place, trace = "", error.__traceback__
    step: TracebackType | None = trace
    while step is not None:
        if (name := step.tb_frame.f_code.co_filename) in ("<program>", "<check>"):
            place = f" ({name[1:-1]}, line {step.tb_lineno})"
        step = step.tb_next
    text = f"{type(error).__name__}: {error}".removesuffix(": ")[:400] + place
    tell(b"F", text.encode("utf-8", "replace")[:1000])
    show(type(error), error, trace and trace.tb_next)
    flush()
    exit_(1)


if __name__ == "__main__":
    main()
