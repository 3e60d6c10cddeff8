"""Weights in and out: files of other libraries, read as data and never run."""
