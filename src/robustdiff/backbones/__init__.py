"""Networks: by name, from checkpoints, and back to them."""
