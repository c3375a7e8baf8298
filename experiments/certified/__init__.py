"""Certified accuracy of a network trained under Gaussian noise: fixed and sequential votes, beside attacks."""
