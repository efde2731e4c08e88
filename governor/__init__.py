"""Keeps AI agents' sessions alive when their containers run out of memory."""

__version__ = "0.1.0"
