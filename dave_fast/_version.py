"""The version, imported by nothing but its number: what is built, stored and served names it."""

__version__ = "0.1.0"
