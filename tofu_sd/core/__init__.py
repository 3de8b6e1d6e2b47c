"""Tensors in, tensors out: matching, merging and attention by group size. No model is known here."""
