"""Passes over the eval graph of a frozen model."""
