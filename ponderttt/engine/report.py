"""A request's final account of its test-time training."""

from __future__ import annotations

from ponderttt.engine.outputs import CostSummary, TTTReport
from ponderttt.engine.sequence import Group


def ttt_report(group: Group, pending: int) -> TTTReport | None:
    """What was learned; None where nothing was asked for and nothing happened."""
    session, ttt = group.session, group.ttt
    if session is None and not group.named:
        return None
    reports = tuple(group.reports)
    count = len(reports)
    cost = CostSummary(
        nominal=sum(r.nominal for r in reports) / count if count else 0.0,
        measured=sum(r.measured for r in reports) / count if count else 0.0,
        seconds=sum(r.seconds for r in reports),
        chunks=count,
    )
    return TTTReport(
        session=session.id if session is not None else None,
        version_before=group.version_before,
        version_after=session.version if session is not None else 0,
        digest=group.digest,
        gate=ttt.gate,
        budget=ttt.budget,
        cost_model=ttt.cost_model,
        chunk_size=ttt.chunk_size,
        when=ttt.when,
        cost=cost,
        chunks=reports,
        pending=pending,
        choice=group.choice,
    )
