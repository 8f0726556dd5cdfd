"""How a quantized weight is stored: `StorageFormat` in format.py, and one module a format: dense, bnb4, packed.

A new format is a new module here, with a line in `loftq_exp.schemes.FORMATS`. Imports loftq, kernels, schemes, errors.
"""
