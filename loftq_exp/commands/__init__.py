"""What is typed: run, cache, export. The only package that knows Hydra and argv; imports everything below it."""
