"""`ponderttt serve`. Its options are the fields of `Settings`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic.fields import FieldInfo

from server.settings import ENV_PREFIX, Settings
from server.settings_sources import CONFIG_VARIABLE, load_settings

if TYPE_CHECKING:
    from ponderttt.engine.core import EngineCore


_LOG = logging.getLogger(__name__)


def options_from(kind: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command that takes keyword arguments one option per setting of a kind."""

    def give(command: Callable[..., None]) -> Callable[..., None]:
        parameters = _parameters(kind)
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return give


def _parameters(kind: type[Settings]) -> list[inspect.Parameter]:
    return [
        inspect.Parameter(
            "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
        ),
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None,
                typer.Option(
                    "--config",
                    help="TOML file with any of these settings.",
                    envvar=CONFIG_VARIABLE,
                    rich_help_panel="Server",
                ),
            ],
        ),
        *(_parameter(name, field) for name, field in kind.model_fields.items()),
    ]


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    extra = field.json_schema_extra
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if field.annotation is bool else flag,
        help=field.description,
        envvar=f"{ENV_PREFIX}{name.upper()}",
        show_default=field.default is not None,
        rich_help_panel=str(extra["panel"]) if isinstance(extra, dict) else None,
    )
    annotation: Any = Annotated[field.annotation | None, option]  # type: ignore[operator]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation
    )


def given_options(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    """What the command line or the environment names: a default must not win over the TOML file."""
    return {name: value for name, value in options.items() if _is_given(context, name)}


@options_from(Settings)
def serve(context: typer.Context, **options: Any) -> None:
    """Serve a model that learns while it serves, with OpenAI's API."""
    config = options.pop("config")
    _serve(load_settings(given_options(context, options), config))


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def _serve(settings: Settings) -> None:
    import torch
    import uvicorn

    from ponderttt.engine.async_engine import AsyncEngine
    from ponderttt.engine.threads import run_apart
    from server.app import create_app
    from server.auth import check_exposure
    from server.build import build_core
    from server.keys import load_keys
    from server.logs import log_config
    from server.runner import DrainingServer, base_url, bind

    # Before the model is loaded, which may take minutes.
    sock = bind(settings.host, settings.port)
    with sock:
        check_exposure(sock, settings)
        if settings.api_key_file is not None:
            load_keys(settings.api_key_file)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        core = run_apart(lambda: build_core(settings, progress=True))
        _warn_of_shorter_context(settings.max_model_len, core.max_model_len)
        engine = AsyncEngine(core)
        config = uvicorn.Config(
            create_app(engine, settings),
            log_config=log_config(settings.log_format, settings.log_level),
            # Ours has more to say, see `RequestLog`.
            access_log=False,
            lifespan="on",
            # The same whether or not Ray Serve has brought others.
            http="h11",
            loop="asyncio",
            ws="none",
            timeout_graceful_shutdown=5,
        )
        url = base_url(sock)
        server = DrainingServer(
            config, engine, settings.drain_seconds, lambda: typer.echo(_banner(url, core, settings))
        )
        server.run([sock])


def _warn_of_shorter_context(asked: int | None, served: int) -> None:
    if asked is not None and asked > served:
        _LOG.warning(
            "max_model_len %d is more than the model and max_kv_tokens allow; the context window "
            "is %d tokens", asked, served,
        )  # fmt: skip


def _elsewhere(settings: Settings) -> str:
    return f", generated by vLLM at {settings.vllm_url}" if settings.engine == "vllm" else ""


def _banner(url: str, core: EngineCore, settings: Settings) -> str:
    ttt = core.config.ttt
    return f"""\
PonderTTT serves {core.model_name} at {url}{_elsewhere(settings)}
  gate {core.default_gate} · budget {ttt.budget:g} × forward ({ttt.cost_model}) · \
chunks of {ttt.chunk_size} tokens · context {core.max_model_len}
  sessions in {core.sessions.store_url or "memory"} ({len(core.sessions)} there)
  documentation {url}/docs · metrics {url}/metrics

Try it:
  curl {url}/v1/completions -H 'Content-Type: application/json' \\
    -d '{{"prompt": "def fibonacci(n):", "max_tokens": 48, "temperature": 0}}'
"""
