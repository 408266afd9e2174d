"""AdapterHub's adapters (its library `adapters`, 1.3.0), read into primitives.

A folder holds `adapter_config.json`, whose `config` block names the method, and `adapter.safetensors`. The
block is one method or a union of several (Mix-and-Match, UniPELT); each method has a file here. Formulas are
those of the library's own code: `adapters/methods/` and `adapters/models/`.
"""
