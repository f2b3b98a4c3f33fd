"""Which settings hold: the request's, else its session's, else the server's."""

from __future__ import annotations

from typing import Any

import pytest

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import GateName, TTTParams
from ponderttt.engine.config import TTTDefaults
from ponderttt.engine.resolve import ResolvedTTT, for_documents, resolve_ttt
from ponderttt.errors import InvalidRequestError


def resolve(
    request: TTTParams | None = None,
    session: TTTParams | None = None,
    defaults: TTTDefaults | None = None,
    default_gate: GateName = "threshold",
    has_policy: bool = False,
) -> ResolvedTTT:
    return resolve_ttt(
        request or TTTParams(),
        session or TTTParams(),
        defaults or TTTDefaults(),
        default_gate,
        has_policy,
    )


def test_settings_that_nobody_gives_are_the_servers() -> None:
    assert resolve() == ResolvedTTT(
        "threshold", Action.UPDATE_1, 2.0, "nominal", 256, "prompt", "inline", "auto", 0
    )


@pytest.mark.parametrize(
    ("field", "mine", "sessions", "servers"),
    [
        ("budget", 1.5, 2.5, 4.0),
        ("cost_model", "measured", "nominal", "nominal"),
        ("cost_model", "nominal", "measured", "measured"),
        ("chunk_size", 16, 32, 64),
        ("adapt_on", "both", "generated", "prompt"),
        ("read", "session", "auto", "session"),
        ("read", "auto", "session", "session"),
    ],
)
def test_setting_of_the_request_wins_over_the_sessions_and_that_over_the_servers(
    field: str, mine: Any, sessions: Any, servers: Any
) -> None:
    request, session = TTTParams(**{field: mine}), TTTParams(**{field: sessions})
    defaults = TTTDefaults(**{field: servers})
    assert getattr(resolve(request, session, defaults), field) == mine
    assert getattr(resolve(None, session, defaults), field) == sessions
    assert getattr(resolve(None, None, defaults), field) == servers


@pytest.mark.parametrize(
    ("request_", "session", "gate"),
    [
        (TTTParams(), TTTParams(), "random"),
        (TTTParams(gate="off"), TTTParams(gate="fixed"), "off"),
        (TTTParams(), TTTParams(gate="off"), "off"),
        # Naming an action asks for the gate that takes one.
        (TTTParams(action=Action.UPDATE_2), TTTParams(gate="off"), "fixed"),
        (TTTParams(), TTTParams(action=Action.UPDATE_2), "fixed"),
        (TTTParams(gate="threshold"), TTTParams(action=Action.UPDATE_2), "threshold"),
    ],
)
def test_gate_is_the_first_that_is_named(
    request_: TTTParams, session: TTTParams, gate: str
) -> None:
    assert resolve(request_, session, default_gate="random").gate == gate


def test_action_of_the_session_holds_where_the_request_asks_for_fixed_alone() -> None:
    session = TTTParams(gate="fixed", action=Action.UPDATE_4)
    assert resolve(TTTParams(gate="fixed"), session).action is Action.UPDATE_4
    assert resolve(TTTParams(action=Action.UPDATE_2), session).action is Action.UPDATE_2


def test_seed_of_the_request_wins_even_where_it_is_zero() -> None:
    assert resolve(TTTParams(seed=0), TTTParams(seed=5)).seed == 0
    assert resolve(None, TTTParams(seed=5)).seed == 5


def test_budget_for_fixed_is_the_callers_alone() -> None:
    assert resolve(TTTParams(gate="fixed")).budget is None
    assert resolve(TTTParams(gate="fixed", budget=2.0)).budget == 2.0
    assert resolve(TTTParams(gate="fixed"), TTTParams(budget=3.0)).budget == 3.0


@pytest.mark.parametrize("level", ["request", "session", "server"])
def test_policy_gate_without_a_policy_is_refused(level: str) -> None:
    policy = TTTParams(gate="policy")
    with pytest.raises(
        InvalidRequestError, match="needs a policy trained for this model"
    ) as caught:
        resolve(
            policy if level == "request" else None,
            policy if level == "session" else None,
            default_gate="policy" if level == "server" else "threshold",
        )
    assert caught.value.param == "ttt.gate"
    assert resolve(policy, has_policy=True).gate == "policy"


def test_background_without_a_session_is_inline() -> None:
    later = TTTDefaults(when="background")
    assert resolve(TTTParams(), None, later).when == "inline"
    assert resolve(TTTParams(session="s"), None, later).when == "background"
    assert resolve(TTTParams(session="s", when="inline"), None, later).when == "inline"
    session = TTTParams(session="s", when="background")
    assert resolve(TTTParams(session="s"), session).when == "background"


def test_documents_are_learned_inline_whatever_the_session_prefers() -> None:
    request = TTTParams(session="s", when="background", adapt_on="generated", chunk_size=64)
    resolved = for_documents(resolve(request))
    assert (resolved.when, resolved.adapt_on, resolved.chunk_size) == ("inline", "prompt", 64)
    assert resolved.learns_prompt


@pytest.mark.parametrize(
    ("gate", "adapt_on", "prompt", "generated"),
    [
        ("threshold", "prompt", True, False),
        ("threshold", "generated", False, True),
        ("threshold", "both", True, True),
        ("off", "both", False, False),
    ],
)
def test_phases_that_are_learned_follow_gate_and_adapt_on(
    gate: Any, adapt_on: Any, prompt: bool, generated: bool
) -> None:
    resolved = resolve(TTTParams(gate=gate, adapt_on=adapt_on))
    assert (resolved.learns_prompt, resolved.learns_generated) == (prompt, generated)
