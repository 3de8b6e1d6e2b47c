"""Run from a checkout, not installed: classifiers, AdaptiVision, and the training of the embedded models."""
