"""Serving engines, one module or package each; `registry` maps their names to them."""
