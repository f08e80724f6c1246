"""What `sdan doctor` checks: this machine, each node of a cluster, and the ways between nodes."""
