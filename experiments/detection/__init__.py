"""Detectors against PGD, C&W and an attacker who knows them, recorded."""
