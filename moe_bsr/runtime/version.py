"""Version of this package. It is defined here so that every subpackage can import it."""

__version__ = "0.1.0"
