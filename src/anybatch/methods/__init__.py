"""One file a method: its reference function, its layer, and the part that a scheme is summed from."""
