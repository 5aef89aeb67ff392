"""Memory of a step that is not run."""
