"""A hub id, folder or wheel becomes tensors by name, and the layout: which weights are quantized.

Imports config, device, errors.
"""
