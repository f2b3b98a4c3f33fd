"""What several tests of training share: a tiny recipe, its engine and its traces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ponderttt.engine.core import EngineCore
from tests.training import tiny
from training.recipe import SPLITS, Recipe, load_recipe
from training.tracing import collect_traces, open_core


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads, which on busy cores only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of repositories."""
    root = tmp_path_factory.mktemp("corpora")
    for name in tiny.REPOSITORIES:
        tiny.write_repository(root, name)
    return root


@pytest.fixture(scope="session")
def tiny_recipe_file(
    tmp_path_factory: pytest.TempPathFactory, tiny_corpora: Path, tiny_llama_dir: Path
) -> Path:
    """A recipe for the tiny Llama."""
    values = tiny.recipe_values(tiny_llama_dir, tiny_corpora)
    return tiny.write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.json", values)


@pytest.fixture(scope="session")
def tiny_recipe(tiny_recipe_file: Path) -> Recipe:
    """The same, loaded."""
    return load_recipe(str(tiny_recipe_file))


@pytest.fixture(scope="session")
def tiny_core(tiny_recipe: Recipe) -> EngineCore:
    """The engine of the recipe, with room for ten sessions."""
    return open_core(tiny_recipe, slots=10)


@pytest.fixture(scope="session")
def tiny_traces(
    tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Recipe, tiny_core: EngineCore
) -> Path:
    """Traces of all three sets; not to be written to."""
    path = tmp_path_factory.mktemp("traces") / "tiny.jsonl"
    collect_traces(tiny_recipe, tiny_core, path, SPLITS, progress=False)
    return path
