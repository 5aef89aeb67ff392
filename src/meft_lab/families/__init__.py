"""Families of models: a catalogue of tiny ones, and the checks that tell what works with each (`meft families`)."""
