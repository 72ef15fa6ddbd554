"""What "good" means while a block learns."""
