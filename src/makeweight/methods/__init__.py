"""How a network is changed: folder = stage = order of execution, file = one idea."""
