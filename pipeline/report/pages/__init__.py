"""Pages of a comparison of runs and of a validation."""
