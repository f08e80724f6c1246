"""The parts of `sdan retrain`: lock, state, training, comparison, report."""
