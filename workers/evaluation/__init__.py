"""Measures of quality: what an evaluation set says of an artifact, and what a variant keeps of its original.

Arrays in, numbers out. No Celery, no SQL; what loads and runs artifacts is `runs`, what decides is `evaluate` and
`compare`.
"""
