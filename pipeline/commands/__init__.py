"""A file for each command but `run` and its kin; `cli.py` lists them."""
