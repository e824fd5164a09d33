"""SAM's encoders and mask decoder with the same weights and less work."""
