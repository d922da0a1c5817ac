"""Where the body of a cache lives."""
