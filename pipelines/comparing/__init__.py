"""`sdan compare`: the rows of a table, trained and scored alike."""
