"""Deep Compression (Han, Mao, Dally, 2016)."""
