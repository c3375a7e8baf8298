"""Attacks that take the model's gradients, one paper a file."""
