"""Federated learning: clients, server, and the rooms for what may vary between two federations."""
