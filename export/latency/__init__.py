"""Latency of model files: worker processes, statistics, checks for disturbances."""
