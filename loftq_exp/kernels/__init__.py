"""Compiled (numba) versions of torch code in loftq and storage, which give the same bytes.

quantize.py processes blocks of values, unpack.py packed codes; both use registers.py and bfloat16.py. Imports nothing.
"""
