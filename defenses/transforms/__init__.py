"""Transforms of the input: what a classifier sees is not what came in. Each says how it must be attacked."""
