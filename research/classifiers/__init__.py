"""Token reduction in image classifiers: training and evaluation."""
