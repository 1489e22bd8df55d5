"""Networks in the engines people deploy with."""
