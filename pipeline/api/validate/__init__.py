"""compress validate: the command, its images and its models."""
