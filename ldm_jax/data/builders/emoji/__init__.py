"""Emoji, drawn from a font of this machine."""
