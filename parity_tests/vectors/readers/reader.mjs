// Runs a Llama on every golden vector that has calls, and holds its logits to their bounds.
//   node reader.mjs FOLDER
// Your port takes the place of llama.mjs.
import { readFileSync } from "node:fs";
import { forward } from "./llama.mjs";

const PRECISION = "float64";  // whose bounds: float64, float32, bfloat16 or float16
const folder = process.argv[2] ?? ".";
const arrays = { F32: Float32Array, F64: Float64Array, I64: BigInt64Array, BOOL: Uint8Array };
const range = (n) => [...Array(n).keys()];

function load(path) {  // safetensors: the header's length, the header in JSON, the data
  const file = readFileSync(`${folder}/${path}`), start = 8 + Number(file.readBigUInt64LE());
  const { __metadata__: metadata, ...header } = JSON.parse(file.toString("utf8", 8, start));
  const tensors = {}, shapes = {};
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
    const copy = new Uint8Array(file.subarray(start + from, start + to)).buffer;
    tensors[name] = Array.from(new arrays[dtype](copy), Number);
    shapes[name] = shape;
  }
  return { metadata, tensors, shapes };
}

const index = JSON.parse(readFileSync(`${folder}/index.json`, "utf8"));
if (index.schema_version !== 1) {
  console.error(`schema version ${index.schema_version}, not 1`);
  process.exit(2);
}
const column = index.precisions.indexOf(PRECISION);
const cases = index.cases.filter((one) => one.kind !== "training");
let failed = 0, worst = 0;
for (const one of cases) {
  const { config, weights } = index.models[one.model], w = load(weights).tensors;
  const { metadata, tensors, shapes } = load(one.trace), caches = [], ends = [];
  for (const [n, { after }] of JSON.parse(metadata.calls).entries()) {
    const get = (name) => tensors[`call.${n}.${name}`], [rows, length] = shapes[`call.${n}.tokens`];
    const cached = after === null ? 0 : ends[after], keys = cached + length;
    const v = config.vocab_size;
    let error = 0, largest = 0;
    ends.push(keys);
    caches.push(range(rows).map((b) => {
      const row = (name, size) => get(name)?.slice(b * size, (b + 1) * size);
      const positions = row("positions", length) ?? range(length).map((t) => cached + t);
      const causal = range(length * keys).map((i) => i % keys <= cached + Math.floor(i / keys));
      const bytes = row("mask", length * keys) ?? causal;
      const mask = range(length).map((t) => bytes.slice(t * keys, (t + 1) * keys));
      const before = after === null ? null : caches[after][b];
      const [logits, cache] = forward(w, config, row("tokens", length), positions, mask, before);
      const expected = row("logits", length * v);
      const [first, end] = one.real[n]?.[b] ?? [0, length];  // padding is not judged
      for (let i = first * v; i < end * v; i++) {
        const off = Math.abs(logits[Math.floor(i / v)][i % v] - expected[i]);
        error = Math.max(error, Number.isFinite(off) ? off : Infinity);
        largest = Math.max(largest, Math.abs(expected[i]));
      }
      return cache;
    }));
    const share = error / largest / one.bounds[`call.${n}.logits`][column];
    worst = Math.max(worst, share);
    if (share <= 1) continue;
    console.log(`FAILED ${one.id}: error ${error / largest}, ${share} of its bound`);
    failed++;
  }
}
console.log(`${cases.length} cases, ${failed} calls failed, largest error ${worst} of its bound`);
process.exit(failed || !cases.length ? 1 : 0);
