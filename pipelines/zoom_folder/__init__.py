"""`sdan zoom` for folders and buckets."""
