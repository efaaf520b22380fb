"""Conditions: the arguments of a network besides x_t and t."""
