"""Helpers that know neither segmenters nor SAM."""
