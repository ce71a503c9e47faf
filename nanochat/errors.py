"""The root of all errors that a user can mend: a wrong flag, file, checkpoint or value; and remedies that many messages name."""


class UserError(ValueError):
    """The message is one line: what was found, what was expected, what to do. The command line prints it and exits with 2; any
    other exception is a bug of this project and is shown as one."""


class TooManyPictures(UserError):
    """More pictures in one question than the model can answer about. The command line adds the flag that asks one by one."""


class NotTrained(UserError):
    """A question of a kind that the model was never trained to answer. The command line adds the flag that names another."""


UPDATE = "update the folder of the project, and run pip install again in it"  # not pip's --upgrade: no index has this package


def install(extra: str) -> str:
    """How to install an extra of the project, which is on no index: pip would take a stranger's package of that name."""
    return f'pip install ".[{extra}]" in the folder of the project'
