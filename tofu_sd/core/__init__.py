"""Matching, merging and proportional attention on tensors. Nothing here depends on a model."""
