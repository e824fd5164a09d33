"""CamVid: a trained ESPNet at two resolutions, refined by a trained SAM."""
