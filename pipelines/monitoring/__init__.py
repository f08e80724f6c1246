"""What SDAN measures of itself, for Prometheus and Grafana."""
