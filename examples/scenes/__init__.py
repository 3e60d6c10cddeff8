"""Coloured shapes, drawn and captioned here: data set, recipes, exact checker."""
