"""Colour spaces that picture files state: ICC profiles, and numbers."""
