"""A report of a run: one HTML page that is complete in itself."""
