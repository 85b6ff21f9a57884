"""Options, their defaults and limits, and recipes."""
