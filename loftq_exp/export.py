"""`python -m loftq_exp.export`: see loftq_exp.commands.export_model."""

import sys

from loftq_exp.commands.export_model import main

if __name__ == "__main__":
    sys.exit(main())
