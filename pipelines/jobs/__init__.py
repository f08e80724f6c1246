"""Verbs on a cluster: submitted as jobs, with GPUs asked of the autoscaler, and estimated before they run."""
