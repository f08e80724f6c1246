"""Registered versions: how they are written as MLflow models (logged.py) and described (description.py)."""
