"""The options that `bench humaneval`, `mbpp` and `classeval` share."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from clients.calls import LOOKUP_RETRIES, RETRIES

# What nobody should have said once and forgotten.
_SAID_EACH_TIME = {"no_sandbox", "fresh", "self_test"}
_ASKING, _LEARNING, _RUNNING = "Asking", "Learning", "Running"


def _option(panel: str, help_text: str, *names: str, env: str | None = None, **rest: Any) -> Any:
    """An option; `env` names its variable where that is not PONDERTTT_BENCH_ and its own name."""
    variable = f"PONDERTTT_{env}" if env else None
    return typer.Option(*names, help=help_text, envvar=variable, rich_help_panel=panel, **rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was given on the command line; the annotations are the help."""

    base_url: Annotated[str, _option(_ASKING, "Where the server is.", env="BASE_URL")] = (
        "http://127.0.0.1:8000"
    )
    api_key_file: Annotated[
        Path | None,
        _option(_ASKING, "File with the server's key.", env="API_KEY_FILE", dir_okay=False),
    ] = None
    model: Annotated[
        str | None,
        _option(_ASKING, "Default: the first that the server names.", env="MODEL"),
    ] = None
    data: Annotated[
        str | None,
        _option(_ASKING, "JSON or JSONL file in the data set's schema. See the command's text."),
    ] = None
    problems: Annotated[
        str | None,
        _option(_ASKING, "Ask only these: task_ids, or their numbers, with commas between."),
    ] = None
    limit: Annotated[int | None, _option(_ASKING, "Ask only the first so many.", min=1)] = None
    prompting: Annotated[
        Literal["chat", "base"],
        _option(
            _ASKING,
            "chat: ask a chat model; its first fenced block counts. base: let a model go on with "
            "the text (HumanEval's, and the next line's indentation but for its last space); what "
            "comes after the data set's end mark is cut off.",
        ),
    ] = "chat"
    max_tokens: Annotated[
        int | None,
        _option(_ASKING, "Of an answer. Default: 400; classeval 2048.", min=1),
    ] = None
    temperature: Annotated[float, _option(_ASKING, "0 is greedy.", min=0.0, max=2.0)] = 0.0
    top_p: Annotated[float, _option(_ASKING, "Nucleus mass.", min=0.0, max=1.0)] = 1.0
    samples: Annotated[
        int, _option(_ASKING, "Answers per problem, n of pass@k.", "--samples", "-n", min=1)
    ] = 1
    k: Annotated[
        str, _option(_ASKING, "k of pass@k, with commas between; those above n are left out.")
    ] = "1,10,100"
    gate: Annotated[
        Literal["policy", "threshold", "random", "fixed", "off"] | None,
        _option(
            _LEARNING,
            "Who decides what is learned. Without it nothing about learning is sent: any endpoint "
            "understands, and ours does as it was started.",
        ),
    ] = None
    action: Annotated[
        Literal["SKIP", "UPDATE_1", "UPDATE_2", "UPDATE_4"] | None,
        _option(_LEARNING, "Of gate fixed."),
    ] = None
    budget: Annotated[
        float | None,
        _option(_LEARNING, "Highest mean cost per chunk, × forward.", min=1.0, max=12.0),
    ] = None
    cost_model: Annotated[
        Literal["nominal", "measured"] | None,
        _option(_LEARNING, "Costs in which the budget is counted."),
    ] = None
    adapt_on: Annotated[
        Literal["prompt", "generated", "both"] | None, _option(_LEARNING, "What is learned.")
    ] = None
    when: Annotated[
        Literal["inline", "background"] | None,
        _option(_LEARNING, "background: learn in idle time; needs --session and --no-fork."),
    ] = None
    read: Annotated[
        Literal["auto", "session"] | None,
        _option(
            _LEARNING,
            "Whose weights answer: the session's where they predict the prompt better than the "
            "base model's (auto), or always the session's (session).",
        ),
    ] = None
    chunk_size: Annotated[
        int | None,
        _option(
            _LEARNING,
            "Tokens per chunk. Default: 64 with a gate, since most prompts here are shorter than "
            "the server's 256.",
        ),
    ] = None
    session: Annotated[
        str | None,
        _option(
            _LEARNING,
            "Ask inside this session. Without --gate it is only read, and stays what it is.",
        ),
    ] = None
    fork: Annotated[
        bool,
        _option(
            _LEARNING,
            "With --session and a gate that learns: ask each problem in a copy of the session. "
            "Otherwise the session goes on learning from problem to problem, one at a time.",
            "--fork/--no-fork",
        ),
    ] = True
    concurrency: Annotated[
        int | None, _option(_RUNNING, "Requests at once. Default: 8.", min=1, max=1000)
    ] = None
    workers: Annotated[
        int | None, _option(_RUNNING, "Programs run at once. Default: one per core.", min=1)
    ] = None
    run_timeout: Annotated[
        float, _option(_RUNNING, "Seconds that a program may take.", min=0.1, max=3600)
    ] = 10.0
    run_memory: Annotated[
        int, _option(_RUNNING, "MiB of memory that a program may take.", min=64)
    ] = 1024
    no_sandbox: Annotated[
        bool,
        _option(
            _RUNNING,
            "Run what the model wrote without a sandbox, with your rights.",
            "--no-sandbox",
        ),
    ] = False
    timeout: Annotated[
        float, _option(_RUNNING, "Seconds for one answer.", min=1.0, env="TIMEOUT")
    ] = 600.0
    retries: Annotated[
        int | None,
        _option(
            _RUNNING,
            "Times that a request is sent again while the server is busy (429, 503). Default: "
            f"{RETRIES}; before the run, {LOOKUP_RETRIES}.",
            min=0,
            env="RETRIES",
        ),
    ] = None
    seed: Annotated[int, _option(_RUNNING, "Of all draws.", min=0, env="SEED")] = 0
    output: Annotated[
        Path | None,
        _option(
            _RUNNING,
            "Result file; a run that it belongs to goes on. Default: bench-COMMAND.jsonl.",
            dir_okay=False,
        ),
    ] = None
    fresh: Annotated[bool, _option(_RUNNING, "Overwrite the result file.", "--fresh")] = False
    json_file: Annotated[
        Path | None, _option(_RUNNING, "Write the summary here.", "--json", dir_okay=False)
    ] = None
    quiet: Annotated[bool, _option(_RUNNING, "Show no progress.", "--quiet", env="QUIET")] = False
    self_test: Annotated[
        bool,
        _option(
            _RUNNING,
            "No server: run the data set's solutions, which all should pass, and mutated ones, "
            "none of which should.",
            "--self-test",
        ),
    ] = False


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command line for a function of `Options` and further arguments of its own."""
    shared = {field.name: field.default for field in dataclasses.fields(Options)}
    hints = get_type_hints(Options, include_extras=True)
    for name in shared.keys() - _SAID_EACH_TIME:
        (option,) = hints[name].__metadata__
        option.envvar = option.envvar or f"PONDERTTT_BENCH_{name.removesuffix('_file').upper()}"
    own_hints = get_type_hints(command, include_extras=True)
    own = list(inspect.signature(command).parameters.values())[1:]
    parameters = [
        *(each.replace(annotation=own_hints[each.name]) for each in own),
        *(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name]
            )
            for name, default in shared.items()
        ),
    ]
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]

    def run(**given: Any) -> None:
        options = Options(**{name: given.pop(name) for name in shared})
        command(options, **given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run
