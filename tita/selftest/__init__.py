"""Self-test: whether guided decoding and training are right, fast and fit on this machine."""
