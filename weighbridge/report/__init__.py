"""One self-contained page of a version: plots, tables, a model card. Knows the wire types and nothing of the registry.

What does not belong here: torch, SQL, decisions. A figure that is not recorded is not in the report.
"""
