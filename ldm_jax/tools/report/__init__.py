"""A run told on one page, for a person: `report.html`, complete in itself."""
