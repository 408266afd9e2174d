"""Worker processes that run adapters' untrusted tokenizers and chat templates."""
