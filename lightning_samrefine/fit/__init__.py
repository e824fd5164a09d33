"""A fusion that is fitted to labeled images, beside a control without SAM."""
