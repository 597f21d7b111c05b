"""Errors for a person: what happened, and what to do next."""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class Exit(IntEnum):
    """Exit codes of the `appliance` command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    AUTH = 4
    CONFLICT = 5


class ApplianceError(Exception):
    """An error that is shown to a person as one line.

    `code` is a stable word for programs, `next` the step that gets the person on.
    `exit` is the exit status of the command, `status` the HTTP status of the control API.
    """

    exit: Exit = Exit.FAILED
    status: int = 500

    def __init__(self, code: str, message: str, next: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.next = next

    def __str__(self) -> str:
        return f"{self.message} — {self.next}"

    def problem(self) -> dict[str, str | int]:
        """The error as a process leaves it for another."""
        return {"code": self.code, "message": self.message, "next": self.next, "status": self.status}

    @staticmethod
    def from_problem(problem: dict[str, Any]) -> ApplianceError:
        """The error that `problem` says."""
        error = InvalidInput(problem["code"], problem["message"], problem["next"])
        error.status = problem["status"]
        return error


def reason(error: Exception) -> str:
    """One line of any error: what an error of ours says, else its kind and the first line of its text."""
    if isinstance(error, ApplianceError):
        return error.message
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


class InvalidInput(ApplianceError):
    """What the person gave cannot be used: a file, a recipe, an option."""

    exit = Exit.USAGE
    status = 400


class NotFound(ApplianceError):
    """A name that nothing goes by."""

    exit = Exit.CONFLICT
    status = 404


class Conflict(ApplianceError):
    """The request does not fit the present state."""

    exit = Exit.CONFLICT
    status = 409


class Unreachable(ApplianceError):
    """The daemon does not answer."""

    exit = Exit.UNREACHABLE
    status = 503


class Unanswered(Unreachable):
    """The daemon lives, and has not answered in time."""

    exit = Exit.FAILED
    status = 504


class NotAllowed(ApplianceError):
    """The caller may not do this."""

    exit = Exit.AUTH
    status = 403


class NoSpace(ApplianceError):
    """The disk cannot take what has to be written."""

    status = 507


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: Python's own, or a library's by its words."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "OUT_OF_MEMORY", "ALLOC_FAILED")
    )
