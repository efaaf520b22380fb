"""Distances between p_θ(x_t), the distribution of a sampler's states, and q(x_t), that of the training points."""
