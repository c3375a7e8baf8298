"""Attacks that see only scores or labels, one paper a file."""
