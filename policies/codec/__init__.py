"""The forms keys and values are kept in, a method per file."""
