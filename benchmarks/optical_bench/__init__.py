"""Test charts through simulated cameras, and what is measured on the enlarged pictures."""
