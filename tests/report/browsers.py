"""Where pages are looked at."""

from pathlib import Path

SCREENSHOTS = Path(__file__).parents[2] / "out" / "screenshots"
PHONE, DESK = (390, 844), (1280, 860)
