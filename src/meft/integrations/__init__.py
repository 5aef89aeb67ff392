"""Plug-ins for other programs that train: each module is imported by that program, and by nothing else here."""
