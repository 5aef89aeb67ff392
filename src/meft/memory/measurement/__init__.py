"""Memory of a step that is run."""
