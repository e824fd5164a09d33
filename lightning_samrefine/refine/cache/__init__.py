"""What SAM computes once an image, in memory or on disk."""
