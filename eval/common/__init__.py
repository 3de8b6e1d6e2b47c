"""What all commands share: files, options, devices, provenance."""
