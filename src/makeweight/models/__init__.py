"""What a network is: one `ModelSpec` literal per family, and checkpoints read block by block."""
