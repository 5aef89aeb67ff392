"""Files that are written whole or not at all, and the results that go into them."""
