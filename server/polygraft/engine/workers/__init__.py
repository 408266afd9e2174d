"""Threads that do slow work away from the event loop."""
