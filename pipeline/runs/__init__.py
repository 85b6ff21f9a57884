"""The run folder, its results, the cache, and the process that runs it."""
