"""A request's account of what was learned."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from ponderttt.adaptation.actions import NOMINAL, Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.config import TTTDefaults
from ponderttt.engine.outputs import ChunkReport
from ponderttt.engine.report import ttt_report
from ponderttt.engine.request import GenerateRequest
from ponderttt.engine.resolve import resolve_ttt
from ponderttt.engine.sequence import Group
from ponderttt.sessions.session import Session

TTT = resolve_ttt(TTTParams(budget=2.5), TTTParams(), TTTDefaults(), "threshold", False)


def make_group(session: Session | None, actions: Iterable[Action], *, named: bool = True) -> Group:
    group = Group(GenerateRequest((5,)), session, named, TTT, print)
    group.version_before, group.digest = 3, "abc"
    for index, action in enumerate(actions):
        cost = NOMINAL[action]
        group.reports.append(
            ChunkReport(
                index, "prompt", 0, 8, action, "threshold", 1.0, None, cost, cost, cost / 2, 0.25
            )
        )
    return group


def make_session(*, ephemeral: bool) -> Session:
    session = Session("repo", TTTParams(), ephemeral=ephemeral, state=None)
    session.version = 5
    return session


def test_report_of_chunks_has_mean_costs_and_all_seconds() -> None:
    group = make_group(make_session(ephemeral=False), [Action.UPDATE_1, Action.SKIP])
    report = ttt_report(group, pending=4)
    assert report is not None
    assert (report.cost.nominal, report.cost.measured) == (2.0, 1.0)
    assert (report.cost.seconds, report.cost.chunks) == (0.5, 2)
    assert (report.version_before, report.version_after, report.digest) == (3, 5, "abc")
    assert (report.session, report.pending) == ("repo", 4)
    assert (report.gate, report.budget, report.chunk_size) == ("threshold", 2.5, 256)
    assert report.chunks == tuple(group.reports)


def test_report_without_chunks_costs_nothing() -> None:
    report = ttt_report(make_group(make_session(ephemeral=False), []), 0)
    assert report is not None
    assert (report.cost.nominal, report.cost.measured, report.cost.seconds) == (0.0, 0.0, 0.0)


def test_report_of_weights_for_one_request_names_no_session() -> None:
    report = ttt_report(make_group(make_session(ephemeral=True), [Action.SKIP]), 0)
    assert report is not None
    assert report.session is None


@pytest.mark.parametrize(("named", "there"), [(True, True), (False, False)])
def test_report_where_nothing_was_adapted_is_for_those_who_asked(named: bool, there: bool) -> None:
    report = ttt_report(make_group(None, [], named=named), 0)
    assert (report is not None) is there
    if report is not None:
        assert (report.session, report.version_after) == (None, 0)
