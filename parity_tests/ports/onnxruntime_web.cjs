// Sessions of ONNX Runtime Web, asked by onnxruntime_web.py.
const { numbers, packed, serve } = require('./node_lines.cjs');
const ort = require('onnxruntime-web');

ort.env.wasm.numThreads = 1;
ort.env.logLevel = 'error';

serve({
  async run({ model, inputs }) {
    const session = await ort.InferenceSession.create(numbers(model), { executionProviders: ['wasm'] });
    try {
      const given = Object.entries(inputs).map(([name, value]) => [
        name, new ort.Tensor(value.type, numbers(value), value.dims),
      ]);
      const found = await session.run(Object.fromEntries(given));
      return Object.fromEntries(Object.entries(found).map(([name, value]) => [name, packed(value)]));
    } finally {
      await session.release();
    }
  },
});
