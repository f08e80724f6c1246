"""The parts of `sdan zoom`: what to do (request.py), reading (photo.py) and the rows to write (rows.py)."""
