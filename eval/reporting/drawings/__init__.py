"""Draws plots as SVG, and images beside each other."""
