"""`python -m loftq_exp.rerun`: see loftq_exp.commands.run_again."""

import sys

from loftq_exp.commands.run_again import main

if __name__ == "__main__":
    sys.exit(main())
