"""Per-example gradients, bounded and summed: one module per way to compute them."""
