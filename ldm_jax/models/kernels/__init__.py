"""Replacements of plain operations on some platforms."""
