"""Accountants compared: the same settings by dp-accounting, by Opacus and in closed form."""
