"""Tests of the house itself: its packages, laws, documents and scripts."""
