"""HTTP scoring server over any artifact."""
