"""Programs beside training and sampling; no other room imports them."""
