"""Passes over a converted model, before a file is written."""
