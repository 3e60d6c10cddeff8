"""Data sets, recipes and measures built on the package, which knows none of them."""
