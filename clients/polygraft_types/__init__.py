"""The values that clients and the server share. Imports neither grpc, protobuf nor torch."""
