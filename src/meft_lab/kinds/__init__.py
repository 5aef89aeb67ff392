"""Kinds of tasks that `meft train` knows where the laboratory is installed."""
