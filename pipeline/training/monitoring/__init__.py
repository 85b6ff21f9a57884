"""Metrics, profiling and trackers."""
