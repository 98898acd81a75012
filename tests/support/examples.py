"""How many examples hypothesis tries, by the profile that tests/conftest.py has loaded."""

from hypothesis import settings

# What a profile gives a test that asks for none: hypothesis' own number, and what a fast run has time for.
PROFILES = {"full": 100, "fast": 10}
_FEWEST = 10


def examples(count: int) -> settings:
    """Return settings for count examples, or as much of them as the profile has of a full run; at least ten."""
    return settings(max_examples=max(count * settings.default.max_examples // PROFILES["full"], min(count, _FEWEST)))
