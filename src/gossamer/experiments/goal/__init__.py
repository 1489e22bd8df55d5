"""A size is given, the network is found."""
