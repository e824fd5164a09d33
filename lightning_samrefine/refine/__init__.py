"""From an image and a raw prediction to a refined one."""
