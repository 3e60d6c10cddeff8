"""A run looked through by hand: a page whose knobs make images as they move."""
