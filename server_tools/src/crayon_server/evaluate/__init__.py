"""How good a model is: on its own, and as the exported bundle that a device runs."""
