"""What `compress validate` is made of; see `pipeline/api/validate.py`."""
