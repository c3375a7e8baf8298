"""Tests of the room `defenses`."""
