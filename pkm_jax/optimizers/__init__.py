"""Optimizers by name: for the backbone, for value tables, and for the rows of tables alone."""
