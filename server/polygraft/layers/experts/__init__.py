"""Low-rank weights on modules that hold several experts: which rows go where, and what is added to them."""
