"""How a batch holds its images."""
