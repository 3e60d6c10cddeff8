"""What a picture of a scene shows, read from its pixels."""
