"""What all tests share."""

# Helpers are imported, never collected: one of them silences logging on import.
collect_ignore_glob = ["support/*"]
