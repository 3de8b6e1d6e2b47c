"""Renders, trains and checks the embedded text-to-image models."""
