from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from ponderttt.models.native import blocks, coded_matrix, decode_attention, elementwise
from ponderttt.models.native.library import load


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[object]:
    """Kernels in use whatever the CPU: without AVX-512 they are slow, not wrong."""
    if shutil.which("gcc") is None:
        pytest.skip("no kernels on this machine: no gcc")
    found = load()
    with pytest.MonkeyPatch.context() as patch:
        for module in (blocks, coded_matrix, decode_attention, elementwise):
            patch.setattr(module, "library", lambda: found)
        yield found
