"""Networks: created by name, loaded from checkpoints, and saved to them."""
