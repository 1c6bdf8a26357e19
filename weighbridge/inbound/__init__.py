"""What both HTTP servers, the registry's and the hosts', ask of whoever knocks: by which name they call, from which
page, how many connections they hold and how long they let us wait.

What does not belong here: tokens and roles (registry.api), bodies and what is in them, anything of a model. It imports
nothing of ours.
"""
