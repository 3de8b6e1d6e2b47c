"""Methods that are compared: one file for each, registered by name."""
