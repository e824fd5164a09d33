"""Faster implementations of SAM's encoders and mask decoder, with the same weights."""
