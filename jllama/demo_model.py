"""The path of the demo model that the package contains."""

from pathlib import Path

DEMO = Path(__file__).parent / "demo"
