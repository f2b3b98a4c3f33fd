"""Checkpoints from the Hugging Face hub: found quickly to be out of reach, and never a pickle."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from ponderttt.errors import ModelError

# A hub that says nothing for so long counts as out of reach. The hub's own client tries for half
# a minute and more; a person at a terminal should hear sooner.
PATIENCE_SECONDS = 5.0

# What a model needs: weights as safetensors, settings, tokenizer. No `.bin`, `.pt` or `.pkl`:
# unpickling a download runs whatever code its author put there.
WANTED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "spiece.model",
    "merges.txt",
    "vocab.txt",
]
# Other formats live in sub-folders (`onnx/`, `original/`), and Mistral repositories hold all
# weights a second time.
UNWANTED = ["*/*", "consolidated*.safetensors"]


def endpoint() -> str:
    """The hub's address: `HF_ENDPOINT`, else the official one."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def why_unreachable() -> str | None:
    """Why the hub can't be asked, or None where something answers; decides within seconds."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    answer: list[str | None] = []

    def knock() -> None:
        try:
            httpx.head(endpoint(), timeout=PATIENCE_SECONDS)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            answer.append(f"{endpoint()}: {error}")
        else:
            answer.append(None)

    # In a thread of its own, because no time-out covers a name server that does not answer.
    thread = threading.Thread(target=knock, daemon=True, name="hub-probe")
    thread.start()
    thread.join(PATIENCE_SECONDS + 1)
    if not answer:
        return f"{endpoint()}: no answer within {PATIENCE_SECONDS:.0f} s"
    return answer[0]


def download_file(repository: str, filename: str, directory: Path, *, progress: bool) -> Path:
    """Fetch one file of a repository into `directory`; an interrupted download is taken up again.

    Raises:
        ModelError: the hub is out of reach or refuses.
    """
    if reason := why_unreachable():
        raise ModelError(f"the hub is out of reach ({reason})")
    from huggingface_hub import hf_hub_download

    with _progress_bars(progress), _as_model_error(repository):
        return Path(hf_hub_download(repository, filename, local_dir=directory, endpoint=endpoint()))


def download_model(repository: str, *, progress: bool, offline: bool) -> Path:
    """A checkpoint's directory in the hub's own cache, fetched or brought up to date first.

    A copy in the cache is used as it is where the hub can't be reached or `offline` is set.

    Raises:
        ModelError: it is in neither place, or the hub refuses; says what was tried and what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    reason = "offline was asked for" if offline else why_unreachable()
    try:
        with _progress_bars(progress), _as_model_error(repository):
            return Path(
                snapshot_download(
                    repository,
                    allow_patterns=WANTED,
                    ignore_patterns=UNWANTED,
                    local_files_only=reason is not None,
                    endpoint=endpoint(),
                )
            )
    except ModelError as error:
        if reason is None or not isinstance(
            error.__cause__, (LocalEntryNotFoundError, HFValidationError)
        ):
            raise
        raise ModelError(
            f"model {repository!r} is not in the hub's cache on this machine, and the hub is out "
            f"of reach ({reason}). Check the name and the network (HF_ENDPOINT chooses a mirror, "
            "HF_TOKEN opens private models), or give a local directory or an embedded model: "
            "`ponderttt models list`"
        ) from error


def cached_model(repository: str) -> Path | None:
    """A checkpoint's directory in the hub's cache if it is complete there; asks no network."""
    try:
        return download_model(repository, progress=False, offline=True)
    except ModelError:
        return None


@contextmanager
def _as_model_error(repository: str) -> Iterator[None]:
    """Put the hub client's errors into our words; the original stays chained."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"{repository!r} is gated: accept its terms on {endpoint()}/{repository} and set "
            "HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub at {endpoint()} knows no model {repository!r}: check the name (names look "
            "like `owner/model`); for a private model set HF_TOKEN"
        ) from error
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelError(f"{repository!r} could not be fetched: {error}") from error
    except Exception as error:  # the hub client lets errors of its HTTP and xet layers through
        raise ModelError(
            f"{repository!r} could not be fetched from {endpoint()}: {error}. What has come is "
            "kept; try again"
        ) from error


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Switch the hub client's progress bars for one download."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    to_hide = not shown and not are_progress_bars_disabled()
    if to_hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if to_hide:
            enable_progress_bars()
