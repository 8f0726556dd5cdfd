"""How a quantized weight is stored: packed codes, bitsandbytes' 4 bits, dense values.

Imports loftq, kernels.
"""
