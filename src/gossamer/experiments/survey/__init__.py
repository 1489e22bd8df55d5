"""What the survey of compression asks beside the papers' own systems."""
