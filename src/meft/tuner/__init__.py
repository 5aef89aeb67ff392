"""MEFT as a PEFT method."""
