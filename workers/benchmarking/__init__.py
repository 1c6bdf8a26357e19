"""The parts of the stage *benchmark*: the machine's lease, the measured child, what disturbs it, what numbers mean.

What does not belong here: Celery, SQL, what a variant is chosen by. Only `child` and what it calls import an engine.
"""
