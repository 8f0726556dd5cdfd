"""The initialised checkpoint as a folder: written whole, read, pushed, exported.

Imports source, storage, integrations, loftq, config.
"""
