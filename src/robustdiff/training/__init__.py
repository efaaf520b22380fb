"""Training: one loop on accelerate for pretraining and fine-tuning."""
