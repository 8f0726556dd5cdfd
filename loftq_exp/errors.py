"""The one exception that stands for bad input."""


class UserError(Exception):
    """Something that the user can mend: one line with the setting, its value, what is allowed and what to do.

    The command prints it without a traceback and exits with 1; a traceback is for our own bugs. `integrations`, `storage`,
    `loftq` and `kernels` know no settings: their errors name the weight, its block size or its bits, and who has the setting
    puts its name before that.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
