"""Scores of a model: what a task asks of it, batch by batch, and what it answers.

Imports training's loader, artifact, tasks, config.
"""
