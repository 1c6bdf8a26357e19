"""Stages in a child process that can be killed: a fork of a warm process that never held a secret.

What does not belong here: what a stage decides (workers.validate and its neighbours), rows (workers.stages), a sandbox.
"""
