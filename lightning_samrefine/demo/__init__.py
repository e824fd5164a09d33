"""Self-contained demonstration: procedural scenes, a coarse segmenter and the tiny SAM."""
