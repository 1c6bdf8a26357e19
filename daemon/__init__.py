"""The loops that move everything on: intake, dispatch, reconcile, sequencing; and the embedded `up`.

Not here: what a checkpoint is (storage), what may follow from what (registry), what a stage does (workers). Nothing in
this package imports torch. A daemon keeps no fact in memory that it could not find again: several of them at once do no
harm, and none for a while costs only time.
"""
