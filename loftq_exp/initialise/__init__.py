"""The quantize stage: plan, decompose and cache, or reuse a published checkpoint.

Imports artifact, source, storage, loftq, config.
"""
