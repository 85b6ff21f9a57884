"""Check and time an artifact on a device. It ships with every artifact, as `runtime` does."""
