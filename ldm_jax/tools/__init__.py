"""Programs beside training and sampling; nothing stands on them."""
