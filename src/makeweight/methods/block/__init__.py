"""What changes a block as a whole and leaves its function as it is."""
