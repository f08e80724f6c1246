"""The pyramid offset learner, and the known shifts that train it."""
