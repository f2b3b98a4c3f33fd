"""What can be seen on the picture of a load."""

from __future__ import annotations

from matplotlib.figure import Figure

from clients.load.plot import _traffic
from tests.clients.load.test_summary import RECORDS


def test_requests_at_once_are_drawn_above_the_tokens() -> None:
    figure = Figure()
    axes = figure.subplots()
    _traffic(axes, [record for record in RECORDS if not record["warmup"]])
    other = next(each for each in figure.axes if each is not axes)
    assert axes.get_zorder() > other.get_zorder()
    # Neither hides the other: no background, a fill to look through, and a line around it.
    assert not axes.patch.get_visible()
    assert (axes.collections[0].get_alpha() or 1.0) < 0.5
    assert [line.get_color() for line in axes.lines] == ["tab:gray"]
