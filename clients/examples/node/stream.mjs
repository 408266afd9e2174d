// Streams an answer to Node without generated code: the contract comes from the server's reflection.
//
//     polygraft serve --adapters adapters
//     cd clients/examples/node && npm install
//     node stream.mjs [HOST:PORT] [ADAPTER]

import grpc from '@grpc/grpc-js';
import { GrpcReflection } from 'grpc-js-reflection-client';

const SERVICE = 'polygraft.v1.InferenceService';

const [address = '127.0.0.1:50051', adapter = ''] = process.argv.slice(2);

const credentials = grpc.credentials.createInsecure();
const request = {
  chat: { messages: [{ role: 'user', content: 'What is the capital of Japan?' }] },
  adapter,
  stopping: { max_new_tokens: 32 },
};

try {
  const reflected = await new GrpcReflection(address, credentials).getDescriptorBySymbol(SERVICE);
  const contract = reflected.getPackageObject({ keepCase: true, enums: String, longs: String, defaults: true });
  const client = new contract.polygraft.v1.InferenceService(address, credentials);

  // Breaking out of this loop would cancel the request.
  for await (const chunk of client.GenerateStream(request)) {
    process.stdout.write(chunk.text);
    if (chunk.final) {
      const { finish_reason, usage } = chunk.final.summary;
      console.log(`\n[${finish_reason}, ${usage.completion_tokens} tokens]`);
    }
  }
  process.exit(0); // the reflection client keeps its connection, and with it the process
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exit(1);
}
