"""Check and time an artifact on a device. All but `sample_images` is part of `predict.py`."""
