"""Scores, calibration, inference and comparison of networks."""
