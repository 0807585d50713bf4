"""Side by side with peers: each module prints a table and, last, one line with the ratio."""
