"""A few hundred requests made up from the OpenAPI document; benchmarks/fuzz_api.py sends more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.fuzzing import Tally, fuzz, running_app


# Of schemathesis, about values that it could have made otherwise.
@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
def test_no_request_that_the_document_suggests_fails_or_crashes(
    tiny_qwen2_dir: Path, tmp_path: Path
) -> None:
    tally = Tally()
    with running_app(tiny_qwen2_dir, tmp_path / "keys.toml") as app:
        fuzz(app, 150, 7, tally)
    assert tally.failures == []
    assert tally.requests >= 150
    # It went deep: everything there is has been answered well, and refused.
    answered = {operation for operation, status in tally.statuses if status < 300}
    assert answered >= {"POST /v1/completions", "POST /v1/sessions", "GET /v1/sessions",
                        "POST /v1/sessions/{session_id}/adapt"}  # fmt: skip
    assert {400, 401, 403, 404} <= {status for _, status in tally.statuses}
