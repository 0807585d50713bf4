"""A city's districts learn to forecast pedestrians; no sensor's fortnight is given away."""
