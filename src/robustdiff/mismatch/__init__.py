"""The distance of p_θ(x_t), the law of a sampler's states, from q(x_t), the law that the network was trained on."""
