"""Reading and editing fx graphs. Knows no pass."""
