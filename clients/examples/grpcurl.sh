#!/bin/sh
# Calls a server with nothing but grpcurl, which learns the contract from the server itself.
#
#     polygraft serve --adapters adapters
#     clients/examples/grpcurl.sh [HOST:PORT]
set -eu

address=${1:-127.0.0.1:50051}

echo "# what it serves"
grpcurl -plaintext "$address" list
grpcurl -plaintext "$address" polygraft.v1.InferenceService/GetModel

echo "# is it healthy"
grpcurl -plaintext "$address" grpc.health.v1.Health/Check

echo "# which adapters it has (with a token: -H 'authorization: Bearer TOKEN')"
grpcurl -plaintext -d '{"page_size": 10}' "$address" polygraft.v1.AdapterService/ListAdapters

echo "# one answer of the base model"
grpcurl -plaintext -d '{
  "chat": {"messages": [{"role": "user", "content": "What is the capital of Japan?"}]},
  "stopping": {"max_new_tokens": 32}
}' "$address" polygraft.v1.InferenceService/Generate

echo "# the same, streamed"
grpcurl -plaintext -d '{
  "chat": {"messages": [{"role": "user", "content": "What is the capital of Japan?"}]},
  "stopping": {"max_new_tokens": 32}
}' "$address" polygraft.v1.InferenceService/GenerateStream
