"""Compiled forms (numba) of what loftq and storage define in torch, with the same bytes.

quantize.py works on blocks of values, unpack.py on packed codes; registers.py and bfloat16.py serve both. Imports nothing.
"""
