"""The one exception that commands turn into a line on standard error and exit code 2."""


class UserError(ValueError):
    """Something the user can put right; the message is one line that says what is wrong and what to do."""
