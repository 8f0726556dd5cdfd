"""Compiled (numba) versions of torch code in loftq and storage, which give the same bytes.

quantize.py processes blocks of values, search.py chooses their scales, unpack.py decodes packed codes; they use registers.py and
bfloat16.py. Imports nothing.
"""
