"""Token reduction for image classifiers: ToMe, ToFu and ATM."""
