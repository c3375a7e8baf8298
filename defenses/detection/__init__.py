"""Detectors: numbers that tell adversarial inputs from clean ones, until an attacker knows them (`robust.detector`)."""
