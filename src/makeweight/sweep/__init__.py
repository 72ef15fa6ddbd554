"""When things happen: one block after the other; knows no method and no model by name."""
