"""What the scheduler runs: sequences, and the prefixes that they share."""
