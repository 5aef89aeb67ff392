"""The user's own rows."""
