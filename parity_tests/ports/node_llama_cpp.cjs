// Sequences of a context of node-llama-cpp, asked by node_llama_cpp.py.
const { join } = require('node:path');
const { packed, serve } = require('./node_lines.cjs');

const LENGTH = 320; // positions of one sequence
let llama, model, context, sequences, width;

/** Return the logits [T, V] of appended tokens, from maps of a token to its logit. */
async function append(sequence, tokens) {
  const asked = tokens.map((token) => [token, { generateNext: { logits: true } }]);
  const found = await sequence.controlledEvaluate(asked);
  const logits = new Float32Array(tokens.length * width).fill(NaN);
  found.forEach(({ next }, i) => {
    for (const [token, logit] of next.logits) logits[i * width + token] = logit;
  });
  return packed({ type: 'float32', dims: [tokens.length, width], data: logits });
}

serve({
  async load({ file, rows, vocab }) {
    const place = join(process.env.NODE_PATH, 'node-llama-cpp', 'dist', 'index.js');
    const { getLlama } = await import(place); // a module, which require does not take
    const quiet = { logLevel: 'error', build: 'never', skipDownload: true, progressLogs: false };
    llama ??= await getLlama({ gpu: false, maxThreads: 1, ...quiet });
    await context?.dispose();
    await model?.dispose();
    model = await llama.loadModel({ modelPath: file, useMmap: false });
    context = await model.createContext({
      contextSize: LENGTH,
      batchSize: 16, // so that the scheduler parts long prompts, among all sequences
      sequences: rows,
      threads: 1,
      flashAttention: false,
      experimentalKvCacheKeyType: 'F32',
      experimentalKvCacheValueType: 'F32',
    });
    sequences = Array.from({ length: rows }, () => context.getSequence());
    width = vocab;
  },
  append: ({ rows }) => Promise.all(rows.map((row, i) => append(sequences[i], row))),
});
