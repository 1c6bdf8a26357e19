"""The REST API over the registry's verbs: routes, roles, problem details, long polls. `app.create_app` makes it.

What does not belong here: rules of the registry (they are in its verbs), and anything that loads an uploaded program.
"""
