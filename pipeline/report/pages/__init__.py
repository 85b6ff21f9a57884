"""Pages: the report of a run, a comparison of runs, a validation."""
