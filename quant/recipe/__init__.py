"""Recipes: quantize, judge, gate and publish from one YAML file."""
