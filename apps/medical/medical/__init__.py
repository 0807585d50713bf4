"""Four hospitals train one model of heart disease; no patient is given away."""
