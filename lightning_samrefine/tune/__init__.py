"""Finding thresholds on a validation set: the whole grid in one pass, and a gate that does no harm.

Data flows one way: grid → sweep (counts of every image in every cell) → choice (cell, thresholds
of single classes, open classes) → check (the choice is run, each image under a choice made without
it) → report.
"""
