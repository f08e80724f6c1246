"""report.html: tables, crops before and after, and error maps of several methods, on one self-contained page."""
