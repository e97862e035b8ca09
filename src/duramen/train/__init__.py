"""Training: a loop that goes on to the bit where it was stopped, and what it minimises."""
