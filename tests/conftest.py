"""Settings of all tests."""

from hypothesis import settings

# Machines are noisy: a slow example is no failure.
settings.register_profile("gossamer", deadline=None)
settings.load_profile("gossamer")
