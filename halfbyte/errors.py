"""Errors that a user can act on. Each message is one line that says what to do."""

from __future__ import annotations


class HalfbyteError(Exception):
    """Something failed that the user can put right. The command line prints the message and exits with `exit_code`."""

    exit_code = 1


class UsageError(HalfbyteError):
    """The request itself is wrong: an option, a recipe key, a group size that does not divide."""

    exit_code = 2
