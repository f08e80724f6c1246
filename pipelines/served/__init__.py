"""What a registered version does when MLflow serves it: the script inside the version, and what it calls."""
