"""Settings of a session store."""

from __future__ import annotations

import pytest

from ponderttt.errors import (
    InvalidRequestError,
)
from ponderttt.sessions.config import StoreConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("url", ""), ("keep_versions", 0), ("ram_sessions", -1), ("write_delay", -1.0),
        ("write_delay", float("nan")), ("idle_seconds", float("inf")), ("ttl", 0.0),
    ],
)  # fmt: skip
def test_setting_out_of_range_is_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        StoreConfig(**({"url": "somewhere"} | {field: value}))  # type: ignore[arg-type]
    assert caught.value.param == ("sessions" if field == "url" else field)
