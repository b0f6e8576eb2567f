// Streams a completion from the .proto files as they are, no generated code:
//   make serve                                                  # in one terminal
//   npm ci --prefix examples/node                               # in another
//   node examples/node/generate.js 'def fibonacci(n):'
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const USAGE = 'usage: generate.js [PROMPT] [--target HOST:PORT] [--max-tokens N] [--seed N] [--timeout SECONDS]';
const PROTOS = fileURLToPath(new URL('../../protos', import.meta.url));

function commandLine() {
  const text = (value) => ({ type: 'string', default: value });
  const options = { target: text('127.0.0.1:50051'), 'max-tokens': text('64'), seed: text(), timeout: text('60') };
  try {
    const { values, positionals } = parseArgs({ options, allowPositionals: true });
    return { ...values, prompt: positionals[0] ?? 'def fibonacci(n):' };
  } catch (error) {
    console.error(`${error.message}\n${USAGE}`);
    process.exit(2);
  }
}

function generate(client, options) {
  const request = { text: options.prompt, stopping: { max_tokens: Number(options['max-tokens']) } };
  // uint64 as text: a seed above 2^53 is no JavaScript number. Absent: the server draws one.
  if (options.seed !== undefined) request.sampling = { seed: options.seed };
  // The deadline goes to the server: it plans by it, refuses what can't be done in time, and computes nothing after it.
  return client.Generate(request, { deadline: Date.now() + 1000 * Number(options.timeout) });
}

function show(response) {
  switch (response.event) { // text on stdout as it comes, how it ended and what it took on stderr
    case 'delta':
      process.stdout.write(response.delta.text);
      break;
    case 'finished':
      process.stdout.write('\n');
      console.error(`finish reason: ${response.finished.reason.replace('FINISH_REASON_', '')}`);
      break;
    case 'summary': {
      const { prompt_tokens, output_tokens } = response.summary.usage;
      console.error(`usage: ${prompt_tokens} prompt tokens, ${output_tokens} output tokens`);
    }
  }
}

const options = commandLine();
const rules = { keepCase: true, longs: String, enums: String, defaults: true, oneofs: true, includeDirs: [PROTOS] };
const { carousel } = grpc.loadPackageDefinition(protoLoader.loadSync('carousel/v1/generation.proto', rules));
const client = new carousel.v1.Generation(options.target, grpc.credentials.createInsecure());
const call = generate(client, options);
process.on('SIGINT', () => call.cancel()); // the server stops computing at its next step
call.on('data', show);
call.on('end', () => client.close());
call.on('error', (error) => {
  const isCancelled = error.code === grpc.status.CANCELLED;
  console.error(isCancelled ? '\ncancelled' : `${options.target}: ${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = isCancelled ? 130 : 1;
  client.close();
});
