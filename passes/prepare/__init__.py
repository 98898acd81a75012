"""Passes over a captured graph (torch functions and modules)."""
