"""Feature mimicking: the method for vectors, and its parts for dense and two-stage detectors."""
