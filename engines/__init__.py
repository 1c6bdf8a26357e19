"""Load an artifact, bind its weights to its program, run it: one engine for validating, evaluating and serving.

What does not belong here: Celery, SQL, HTTP, recipes, rollouts. numpy arrays in, numpy arrays out; torch stays inside.
"""
