"""Evaluation: how good the samples are, and how sure we are of it."""
