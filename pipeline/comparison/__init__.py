"""What `compress compare` is made of; see `pipeline/compare.py`."""
