"""Renders the training images of the embedded models."""
