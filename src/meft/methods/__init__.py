"""The ways to train, by name."""
