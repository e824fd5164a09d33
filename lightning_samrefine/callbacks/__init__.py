"""The Lightning callbacks and what they are made of."""
