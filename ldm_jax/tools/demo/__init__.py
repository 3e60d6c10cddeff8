"""A web page to try a run: controls, and the images they select."""
