"""Head splits: which KV heads keep everything and which only stream."""
