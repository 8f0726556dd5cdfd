"""The quantize stage: plan, calibrate, decompose and cache, polish, or reuse a published checkpoint.

Imports calibration, training, artifact, source, tasks, storage, loftq, config, ranks, schemes.
"""
