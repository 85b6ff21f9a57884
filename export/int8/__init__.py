"""Int8 quantization: rewriting, calibration, the search, and fake quantization in torch."""
