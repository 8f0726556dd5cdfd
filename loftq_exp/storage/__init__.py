"""Storage of quantized weights: `StorageFormat` in format.py, and one module per format: dense, bnb4, packed.

To add a format, add a module here and a line in `loftq_exp.schemes.FORMATS`. Imports loftq, kernels, schemes, errors.
"""
