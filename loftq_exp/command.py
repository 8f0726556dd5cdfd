"""What the small commands beside the runs share: options that are refused in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from loftq_exp.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """A parser that refuses in one line, as the rest of the project does."""

    def error(self, message: str) -> NoReturn:
        """Raises the message as a UserError instead of printing the usage."""
        raise UserError(f"{message}; see {self.prog} --help")
