"""Compiled forms (numba) of what loftq and storage define in torch, with the same bytes.

Imports nothing of loftq_exp.
"""
