"""Codecs: mappings between images and the space in which noise is added."""
