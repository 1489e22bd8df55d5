"""Surgery: which units of a network are dead, and the network without them."""
