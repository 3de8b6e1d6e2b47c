"""AdaptiVision: a trainable transformer that condenses its patches into clusters."""
