"""What may be searched: one file an engine, each range with its reason."""
