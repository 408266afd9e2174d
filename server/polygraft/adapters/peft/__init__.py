"""PEFT's kinds, one file each, and the options that they share."""
