"""The generated stubs of the `polygraft.v1` contract."""
