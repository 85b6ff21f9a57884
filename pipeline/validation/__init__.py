"""What `compress validate` is made of; see `pipeline/validate.py`."""
