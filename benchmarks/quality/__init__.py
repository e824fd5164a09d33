"""What refines best: this package's presets against the alternatives, on the same inputs."""
