"""Bytes and bucket events: stores, where their events come from, when a set of objects is complete, blobs by digest.

What does not belong here: models, versions, recipes or anything that has to know what the bytes are for.
"""
