"""Attaches token fusion to the blocks that a host describes, and detaches it."""
