"""Reading the tokenizers of adapters, and turning tokens into text."""
