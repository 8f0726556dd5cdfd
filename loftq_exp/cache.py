"""`python -m loftq_exp.cache`: see loftq_exp.commands.manage_cache."""

import sys

from loftq_exp.commands.manage_cache import main

if __name__ == "__main__":
    sys.exit(main())
