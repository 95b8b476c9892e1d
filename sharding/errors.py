"""The one error a user sees: what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 500  # characters of a part of a message: names out of foreign files may have megabytes


class UserError(Exception):
    """A mistake in the user's input. The command line prints it as one line on stderr and exits with code 2.

    Args:
        where: the key, file or sample that is wrong.
        problem: what is wrong with it.
        remedy: what to do.
    """

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        super().__init__(where, problem, remedy)
        self.where, self.problem, self.remedy = where, problem, remedy

    def __str__(self) -> str:
        end = "" if self.remedy.endswith((".", "?", "!", ")")) else "."
        return f"{plain(self.where)}: {plain(self.problem)}. {plain(self.remedy)}{end}"


class UserErrors(Exception):
    """Several mistakes found in one pass, reported together (exit code 2)."""

    def __init__(self, errors: list[UserError]) -> None:
        super().__init__(errors)
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


@contextmanager
def collected(errors: list[UserError]) -> Iterator[None]:
    """Adds what is raised inside to `errors`, to be reported with what else is wrong."""
    try:
        yield
    except UserErrors as found:
        errors += found.errors
    except UserError as error:
        errors.append(error)


def plain(text: str) -> str:
    """Text out of foreign files as one line to print: what would move the cursor or begin a line is escaped."""
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
