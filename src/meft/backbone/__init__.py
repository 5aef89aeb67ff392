"""Transformers models made reversible in place: their stacks, layers, calls and adapters."""
