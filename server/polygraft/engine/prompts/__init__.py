"""Each tokenizer and chat template that requests are read with: the base's and adapters' own."""
