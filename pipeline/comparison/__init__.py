"""What `compress compare` is made of; see `pipeline/api/compare.py`."""
