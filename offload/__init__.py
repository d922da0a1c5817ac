"""Memory tiers: where the bytes of a cache live, counted from the storages that hold them."""
