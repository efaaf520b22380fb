"""Metrics of sets of images, one per file, found by their names."""
