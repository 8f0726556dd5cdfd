"""The command line: run, cache, export, report, rerun.

The only package that uses Hydra and argv. May import every other package.
"""
