"""Adapters at work on a data set: which one, by which task, and how they compare."""
