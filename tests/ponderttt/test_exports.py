"""The names that programs may rely on. Adding or losing one is deliberate and shows here."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ponderttt
from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.config import EngineConfig
from ponderttt.engine.engine import Engine
from ponderttt.engine.sampling_params import SamplingParams

EXPORTS = {
    "Action": Action,
    "Engine": Engine,
    "EngineConfig": EngineConfig,
    "SamplingParams": SamplingParams,
    "TTTParams": TTTParams,
}


def test_public_names_of_the_package_are_these() -> None:
    assert sorted(ponderttt.__all__) == sorted([*EXPORTS, "__version__"])


@pytest.mark.parametrize("name", EXPORTS)
def test_public_name_when_used_is_the_object_itself(name: str) -> None:
    assert getattr(ponderttt, name) is EXPORTS[name]


def test_public_names_imported_with_a_star_are_all_there() -> None:
    namespace: dict[str, object] = {}
    exec("from ponderttt import *", namespace)
    assert {name for name in namespace if name != "__builtins__"} == set(ponderttt.__all__)


def test_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = ponderttt.Motor


def test_public_names_before_their_first_use_are_listed_by_dir() -> None:
    code = "import ponderttt; print(set(ponderttt.__all__) <= set(dir(ponderttt)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_public_methods_of_the_engine_are_these() -> None:
    public = {name for name in vars(Engine) if not name.startswith("_")}
    assert public == {"adapt", "close", "from_pretrained", "generate", "run", "session"}
