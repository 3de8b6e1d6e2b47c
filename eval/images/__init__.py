"""Generates the images of a run."""
