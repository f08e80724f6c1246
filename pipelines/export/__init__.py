"""`sdan export`: the verb (verb.py), the check of what it wrote (check.py), and darktable's folder (darktable.py)."""
