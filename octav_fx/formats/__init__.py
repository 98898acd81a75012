"""Numbers: levels of a format, which elements share a scale, how codes are packed. Imports torch and nothing else."""
