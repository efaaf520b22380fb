"""How far p_θ(x_t), what a sampler feeds the network, is from q(x_t), what the network was trained on."""
