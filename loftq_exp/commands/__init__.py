"""The command line: run, cache, export, report, sweep, rerun.

The only package that uses Hydra and argv. May import every other package.
"""
