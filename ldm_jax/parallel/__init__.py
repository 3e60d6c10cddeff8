"""Devices and processes: the placement of arrays, the mapping of steps."""
