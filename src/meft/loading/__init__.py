"""Models, tokenizers and adapters from folders and from the hub."""
