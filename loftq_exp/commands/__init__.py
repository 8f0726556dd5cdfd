"""What is typed: run, cache, export, report, rerun. The only package that knows Hydra and argv; imports everything below it."""
