"""Attacks on a real server, too long for the test suite: `python -m tests.attacks`, or `make attacks`."""
