"""Times methods at the sizes of real models."""
