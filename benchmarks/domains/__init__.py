"""Every preset on many data sets, each with a trained network."""
