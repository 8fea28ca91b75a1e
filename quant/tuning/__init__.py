"""Tuning: group scales and norm weights learn by gradient, the codes stay."""
