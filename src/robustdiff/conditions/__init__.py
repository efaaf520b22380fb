"""Conditions: what a network is called with beside x_t and t."""
