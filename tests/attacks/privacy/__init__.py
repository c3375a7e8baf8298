"""Tests of attacks/privacy."""
