// Answers each line of stdin, a JSON object, with one on stdout; node.py has the other end.
const readline = require('node:readline');

console.log = console.info = console.warn = console.error; // stdout is for the answers

const KINDS = {
  float32: Float32Array, float16: Uint16Array, int64: BigInt64Array, int32: Int32Array,
  uint8: Uint8Array, bool: Uint8Array,
};

/** Return the typed array of a packed one; float16 as its bits. */
exports.numbers = ({ type, data }) => {
  const bytes = Uint8Array.from(Buffer.from(data, 'base64')); // a copy, so at an even place
  return new KINDS[type](bytes.buffer);
};

exports.packed = ({ type, dims, data }) => {
  const bytes = Buffer.from(data.buffer, data.byteOffset, data.byteLength);
  return { type, dims, data: bytes.toString('base64') };
};

/** Call functions by the name in ``ask`` until stdin ends. */
exports.serve = async (functions) => {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    let answer;
    try {
      const { ask, ...message } = JSON.parse(line);
      answer = { found: (await functions[ask](message)) ?? null };
    } catch (error) {
      answer = { error: String(error) };
    }
    process.stdout.write(`${JSON.stringify(answer)}\n`);
  }
};
