"""Everything that speaks protobuf and gRPC: nothing above it knows either."""
