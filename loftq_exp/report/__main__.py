"""`python -m loftq_exp.report`. See loftq_exp.commands.write_report."""

import sys

from loftq_exp.commands.write_report import main

if __name__ == "__main__":
    sys.exit(main())
