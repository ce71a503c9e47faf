"""The root of all errors that a user can mend: a wrong flag, file, checkpoint or value."""


class UserError(ValueError):
    """The message is one line: what was found, what was expected, what to do. The command line prints it and exits with 2; any
    other exception is a bug of this project and is shown as one."""
