"""The parts of `sdan zoom`: imports (start.py), requests (request.py), reading (photo.py) and rows to write (rows.py)."""
