from __future__ import annotations

from collections.abc import Iterator

import pytest

from ponderttt.models.native import blocks, coded_matrix, decode_attention, elementwise
from ponderttt.models.native.library import NativeUnavailableError, load


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[object]:
    """Kernels in use whatever the CPU: without AVX-512 they are slow, not wrong."""
    try:
        found = load()
    except NativeUnavailableError as error:
        pytest.skip(f"no kernels on this machine: {error}")
    with pytest.MonkeyPatch.context() as patch:
        for module in (blocks, coded_matrix, decode_attention, elementwise):
            patch.setattr(module, "library", lambda: found)
        yield found
