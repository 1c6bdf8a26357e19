"""The methods of compression, one module a family. `workers.compress` is the stage that calls them.

What does not belong here: rows of the registry, blobs, gates. A method reads an opened original and writes files.
"""
