"""From SAM's masks to a refined label map."""
