"""Programs that travel with an exported form, copied as they stand here."""

from pathlib import Path

SHIPPED = Path(__file__).resolve().parent
"""Where they lie."""
