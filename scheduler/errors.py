"""Every error that the scheduler's processes name. Knows no gRPC: a status is the name of one.

A RequestError becomes the status of a call, with google.rpc details; a StartError is one line on stderr and exit code 1.
"""

from __future__ import annotations

from collections.abc import Mapping

_RETRY_AFTER_NS = 1_000_000_000  # when nobody can say better
_REASONS = {  # of the core's refusals, for ErrorInfo
    "RESOURCE_EXHAUSTED": "QUEUE_FULL",
    "UNAVAILABLE": "NOT_READY",
    "DEADLINE_EXCEEDED": "DEADLINE",
    "FAILED_PRECONDITION": "TOO_LARGE",
    "PERMISSION_DENIED": "UNKNOWN_TENANT",
}


class RequestError(Exception):
    """A call that is refused or that failed; the text is for the caller.

    status: name of a gRPC status. field: path of the field of the request that is wrong (BadRequest), description: what is
    wrong with it. retry_after_ns: when to try again (RetryInfo); 0: no use. reason: a word for programs (ErrorInfo), metadata:
    numbers that go with it.
    """

    status = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        retry_after_ns: int = 0,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.description = message
        self.retry_after_ns = retry_after_ns
        self.reason = reason
        self.metadata = dict(metadata or {})


class InvalidFieldError(RequestError):
    """A field's value can't be used."""

    status = "INVALID_ARGUMENT"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}", field=field)
        self.description = message


class OutOfRangeError(RequestError):
    """A field points to what is not there."""

    status = "OUT_OF_RANGE"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}", field=field)
        self.description = message


class UnreadableMessageError(RequestError):
    """A message that is none of its type."""

    status = "INVALID_ARGUMENT"

    def __init__(self) -> None:
        super().__init__("a message of this call can't be read: is it of another version?")


class UnsupportedFieldError(RequestError):
    """A field that this server can't honour."""

    status = "UNIMPLEMENTED"

    def __init__(self, field: str, by: str = "by this server") -> None:
        super().__init__(f"{field} is not supported {by}", field=field)


class NoChatTemplateError(RequestError):
    """The model has none."""

    status = "FAILED_PRECONDITION"


class NotReplacedError(RequestError):
    """The worker that computes stays."""

    status = "FAILED_PRECONDITION"


class UnavailableError(RequestError):
    """Nobody can compute now; later somebody may."""

    status = "UNAVAILABLE"

    def __init__(self, message: str, *, reason: str = "NOT_READY", retry_after_ns: int = _RETRY_AFTER_NS) -> None:
        super().__init__(message, reason=reason, retry_after_ns=retry_after_ns)


class CancelledElsewhereError(RequestError):
    """The request was cancelled by its id."""

    status = "CANCELLED"


class NotFoundError(RequestError):
    """No such request is known."""

    status = "NOT_FOUND"


class UnauthenticatedError(RequestError):
    """Nobody knows who calls."""

    status = "UNAUTHENTICATED"


class PermissionDeniedError(RequestError):
    """It is known who calls, and that they may not."""

    status = "PERMISSION_DENIED"


class DeadlineError(RequestError):
    """The request's time is over."""

    status = "DEADLINE_EXCEEDED"

    def __init__(self, message: str, metadata: Mapping[str, str]) -> None:
        super().__init__(message, reason=_REASONS[self.status], metadata=metadata)


class RefusedError(RequestError):
    """The core did not accept the request; the status is the core's."""

    def __init__(
        self, status: str, message: str, *, field: str = "", retry_after_ns: int = 0, metadata: Mapping[str, str] | None = None
    ) -> None:
        metadata = dict(metadata or {})
        reason = metadata.pop("reason", _REASONS.get(status, ""))
        super().__init__(message, field=field, retry_after_ns=retry_after_ns, reason=reason, metadata=metadata)
        self.status = status


class StartError(Exception):
    """A process can't start; the text is one line that says what to do."""


class ModelNotFoundError(StartError):
    """There is no such directory, and no such model on the hub."""


class ModelFilesError(StartError):
    """A file of the model is missing, unreadable, or holds what this server can't use."""
