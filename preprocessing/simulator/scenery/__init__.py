"""Procedural scenes: materials, drawing, and one module per subject."""
