"""Kinds of models, such as diffusion models and flow matching: what a checkpoint's diffusers scheduler says of it."""
