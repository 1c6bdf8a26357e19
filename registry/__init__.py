"""The single source of truth: tables, lifecycle, verbs, REST API, client.

What does not belong here: reading checkpoints, running models, Celery, and anything that imports torch.
"""
