"""The engine: scheduling, running and sampling, one step at a time."""
