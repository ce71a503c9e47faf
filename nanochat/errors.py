"""The root of all errors that a user can mend: a wrong flag, file, checkpoint or value."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """The message is one line: what was found, what was expected, what to do. The command line prints it and exits with 2; any
    other exception is a bug of this project and is shown as one."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Makes UserErrors of the ValueErrors of gpt.py, which imports nothing of the project, where its arguments are a user's."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
