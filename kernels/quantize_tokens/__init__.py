"""Activations rounded to 8 bits, one scale a row, on a GPU."""
