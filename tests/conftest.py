"""Fixtures shared by all tests: tiny random checkpoints and the two embedded models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from ponderttt.config import DATA_VARIABLE
from ponderttt.models import store
from tests import helpers

# Machines that run tests are shared: a slow example is not a failure. The same examples every
# time, so that a failure of one run is a failure of the next.
settings.register_profile("ponderttt", deadline=None, derandomize=True)
settings.load_profile("ponderttt")


@pytest.fixture(scope="session", autouse=True)
def _data_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test leaves sessions among the user's data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DATA_VARIABLE, str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-layer Llama of width 64 with tied embeddings."""
    return helpers.make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_qwen2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-layer Qwen2 of width 64 with fill-in-the-middle tokens."""
    return helpers.make_tiny_qwen2(tmp_path_factory.mktemp("tiny-qwen2"))


@pytest.fixture(scope="session")
def tiny_mistral_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-layer Mistral of width 64 with a sliding window of 32."""
    return helpers.make_tiny_mistral(tmp_path_factory.mktemp("tiny-mistral"))


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-layer GPT-2 of width 64."""
    return helpers.make_tiny_gpt2(tmp_path_factory.mktemp("tiny-gpt2"))


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The converted embedded model `smollm2-135m`; use it in tests marked `real_model`."""
    return store.resolve("smollm2-135m", progress=False)


@pytest.fixture(scope="session")
def coder_dir() -> Path:
    """The converted embedded model `qwen2.5-coder-0.5b`; use it in tests marked `real_model`."""
    return store.resolve("qwen2.5-coder-0.5b", progress=False)
