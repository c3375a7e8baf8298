"""Malicious clients: what an attacker inside a federation sends instead of an honest update."""

from robust.registry import Registry

REGISTRY = Registry("malicious client", {})
get = REGISTRY.load
