"""The initialised checkpoint as a folder: written atomically, read, pushed and exported.

Imports source, storage, integrations, loftq, config.
"""
