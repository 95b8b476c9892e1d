"""The one error a user sees: what is wrong, where, and what to do about it."""

from __future__ import annotations


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
        return f"{self.where}: {self.problem}. {self.remedy}{end}"


class UserErrors(Exception):
    """Several mistakes found in one pass, reported together (exit code 2)."""

    def __init__(self, errors: list[UserError]) -> None:
        super().__init__(errors)
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)
