"""Tests, in folders that mirror the packages; contracts/ has one suite per kind, over the registry."""
