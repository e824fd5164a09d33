"""Thresholds from a validation set: the whole grid in one pass, checked on held-out images.

Data flows one way: grid → sweep (counts of every image in every cell) → choice (cell, thresholds
of single classes, refined classes) → trial (the choice is run, each image under a choice made
without it) → report.
"""
