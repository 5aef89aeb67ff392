"""The reversible engine: torch alone. Its rules stand at the head of `meft.engine.engine`."""
