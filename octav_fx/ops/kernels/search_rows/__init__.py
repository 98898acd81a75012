"""The search for the clips of rows in Triton."""
