"""A hundred clients that train nothing."""
