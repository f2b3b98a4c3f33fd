"""The table from errors to statuses covers every error there is."""

from __future__ import annotations

from ponderttt import errors
from ponderttt.errors import (
    AdapterFormatError,
    ConflictError,
    DamagedSessionError,
    InvalidRequestError,
    ModelError,
    NotFoundError,
    OverloadedError,
    PolicyFormatError,
    PonderError,
    PromptTooLongError,
    SessionElsewhereError,
    StoreError,
    UnavailableError,
)
from server.errors import TABLE, describe, error_response

STATUSES: dict[PonderError, int] = {
    InvalidRequestError("a", "b"): 400,
    PromptTooLongError("a", "b"): 413,
    NotFoundError("a", "b"): 404,
    ConflictError("a", "b"): 409,
    SessionElsewhereError("a", "b"): 409,
    OverloadedError("b", retry_after=2.2): 429,
    UnavailableError("b"): 503,
    ModelError("b"): 500,
    AdapterFormatError("b"): 400,
    PolicyFormatError("b"): 500,
    StoreError("b"): 503,
    DamagedSessionError("b"): 409,
}


def test_every_error_of_the_library_has_a_status() -> None:
    ours = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, PonderError)
    } - {PonderError}
    assert {type(error) for error in STATUSES} == ours
    assert {known for known, _ in TABLE} == ours
    for error, status in STATUSES.items():
        response = error_response(error)
        assert response.status_code == status
        assert describe(error)[1]["error"]["message"] == str(error)


def test_table_has_derived_errors_before_their_bases() -> None:
    order = [known for known, _ in TABLE]
    for place, known in enumerate(order):
        assert not any(issubclass(later, known) for later in order[place + 1 :])


def test_retry_after_is_a_whole_number_of_seconds() -> None:
    assert error_response(OverloadedError("b", retry_after=2.2)).headers["Retry-After"] == "3"
    assert error_response(OverloadedError("b", retry_after=0.1)).headers["Retry-After"] == "1"


def test_foreign_error_keeps_its_details_to_itself() -> None:
    kind, body = describe(RuntimeError("/home/someone/secret"))
    assert kind.status == 500
    assert "secret" not in str(body)
