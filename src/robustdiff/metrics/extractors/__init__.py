"""Feature extractors: the spaces in which sets of images are compared, one per file, found by their names."""
