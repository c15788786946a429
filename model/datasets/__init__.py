"""Event logs and the ranking samples made from them."""
