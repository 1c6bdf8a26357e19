"""The stages, the rollout's steps, and Celery as their transport: a message carries a job id and nothing else.

What does not belong here: what a version's next status is (registry.lifecycle), how an artifact is run (engines), when
something is due (daemon). Correctness never rests on Celery: the job's row and its lease decide.
"""
