"""What `make bench` runs: one file for each question, each answered by rows of figures."""
