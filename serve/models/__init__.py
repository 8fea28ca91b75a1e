"""One file an architecture, read top to bottom."""
