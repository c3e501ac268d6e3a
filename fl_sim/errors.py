"""The one error that a user can mend. A module of its own, so that the command line need not import PyTorch to say it."""


class UserError(ValueError):
    """Wrong input by the user: one line that says what, where and what is allowed. The CLI exits with status 2."""
