"""Scoring a model: it answers a task's requests batch by batch.

Imports training's loader, artifact, tasks, config.
"""
