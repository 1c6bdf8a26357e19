"""Serve what the registry assigns: pull artifacts, load them in engine children, answer the Open Inference Protocol v2.

The front process holds clients' connections and forwards bodies; an engine child decodes, computes and encodes.
What does not belong here: tables, rollout decisions, quality judgements, and torch outside an engine child.
"""
