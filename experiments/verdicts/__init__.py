"""Verdicts that the README and the cards quote, each with its conditions, and how to record another."""
