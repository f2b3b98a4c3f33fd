"""The sandbox that the tests attack."""

from __future__ import annotations

import pytest

from clients.sandbox import Sandbox, open_sandbox


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    return open_sandbox()
