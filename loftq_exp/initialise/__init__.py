"""The quantize stage: plan, decompose, cache, or take a published checkpoint off the shelf.

Imports artifact, source, storage, loftq, config.
"""
