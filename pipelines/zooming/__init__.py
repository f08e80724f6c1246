"""The parts of `sdan zoom`: imports (start.py), the request (request.py), reading (photo.py), output rows (rows.py)."""
