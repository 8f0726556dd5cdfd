import sys

from loftq_exp.commands.run import main

if __name__ == "__main__":
    sys.exit(main())
