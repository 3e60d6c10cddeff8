"""One program, `ldm`, with sub-commands."""
