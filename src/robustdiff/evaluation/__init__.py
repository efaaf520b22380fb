"""Evaluation: generation of images, and metrics of them with intervals."""
