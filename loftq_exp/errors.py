"""The exception for invalid input."""

from __future__ import annotations

from loftq_exp.masking import masked


class UserError(Exception):
    """An error that the user can fix: one line with the setting, its value, what is allowed and what to do.

    The command prints it without a traceback and exits with 1; a traceback means a bug in loftq_exp. Errors of
    `integrations`, `storage`, `loftq` and `kernels` name the weight, its block size or its bits. The caller that has the
    setting prepends its name. Secrets in the message are masked: it may quote a server or a library.
    """

    def __init__(self, message: str) -> None:
        super().__init__(masked(" ".join(message.split())))
