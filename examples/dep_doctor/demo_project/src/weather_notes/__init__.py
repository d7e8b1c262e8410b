"""Notes about the weather."""
