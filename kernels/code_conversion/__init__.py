"""Device functions that turn codes of 4 and 8 bits into 16-bit floats, a register at a time."""
