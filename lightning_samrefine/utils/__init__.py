"""Helpers independent of segmenters and of SAM."""
