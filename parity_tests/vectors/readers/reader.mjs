// Computes the logits of every golden vector that has calls, and compares them with the file's.
// Node without packages:  node reader.mjs FOLDER
import { readFileSync } from "node:fs";

const folder = process.argv[2] ?? ".";
const arrays = { F32: Float32Array, F64: Float64Array, I64: BigInt64Array, BOOL: Uint8Array };
function load(path) {  // safetensors: the header's length, the header in JSON, the data
  const file = readFileSync(`${folder}/${path}`), start = 8 + Number(file.readBigUInt64LE());
  const header = JSON.parse(file.toString("utf8", 8, start)), tensors = { shape: {} };
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)
    .filter(([name]) => name !== "__metadata__")) {
    const copy = new Uint8Array(file.subarray(start + from, start + to)).buffer;
    tensors[name] = Array.from(new arrays[dtype](copy), Number);
    tensors.shape[name] = shape;
  }
  return { tensors, metadata: header.__metadata__ };
}
const range = (n) => [...Array(n).keys()];
const dot = (a, b) => a.reduce((sum, one, i) => sum + one * b[i], 0);
const times = (w, x) => range(w.length / x.length).map((i) => dot(x, w.slice(i * x.length)));
const plus = (a, b) => a.map((one, i) => one + b[i]);
const norm = (x, w, eps) => x.map((one, i) => one / Math.sqrt(dot(x, x) / x.length + eps) * w[i]);

function rotate(x, c, position) {  // each head's pairs (i, i + width / 2)
  const y = [...x], s = c.rope_scaling ?? {}, half = c.head_dim / 2;
  for (const i of range(half)) {
    const plain = c.rope_theta ** (-2 * i / c.head_dim);
    const turns = s.original_max_position_embeddings * plain / (2 * Math.PI);
    let kept = s.rope_type === "linear" ? 0 : 1;  // the share of the frequency that is not divided
    if (s.rope_type === "llama3")
      kept = Math.min(1, Math.max(0, (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)));
    const angle = position * plain * (kept + (1 - kept) / (s.factor ?? 1));
    for (let a = i; a < x.length; a += c.head_dim) {
      y[a] = x[a] * Math.cos(angle) - x[a + half] * Math.sin(angle);
      y[a + half] = x[a + half] * Math.cos(angle) + x[a] * Math.sin(angle);
    }
  }
  return y;
}
function attend(q, keys, values, seen, c) {
  const k = c.head_dim, readers = c.num_attention_heads / c.num_key_value_heads;
  return range(c.num_attention_heads).flatMap((h) => {
    const of = (row) => row.slice(Math.floor(h / readers) * k, (Math.floor(h / readers) + 1) * k);
    const scores = seen.map((s) => dot(of(keys[s]), q.slice(h * k)) / Math.sqrt(k));
    const weights = scores.map((one) => Math.exp(one - Math.max(...scores)));
    const total = weights.reduce((a, b) => a + b, 0);
    return range(k).map((i) => dot(weights, seen.map((s) => of(values[s])[i])) / total);
  });
}
function block(x, w, l, c, positions, sees, cache) {
  const p = (name) => w[`model.layers.${l}.${name}.weight`];
  const h = x.map((one) => norm(one, p("input_layernorm"), c.rms_norm_eps));
  const keys = [...cache.keys, ...h.map((one, t) => rotate(times(p("self_attn.k_proj"), one), c, positions[t]))];
  const values = [...cache.values, ...h.map((one) => times(p("self_attn.v_proj"), one))];
  const out = x.map((one, t) => {
    const q = rotate(times(p("self_attn.q_proj"), h[t]), c, positions[t]);
    const seen = range(keys.length).filter((s) => sees(t, s));
    const y = plus(one, times(p("self_attn.o_proj"), attend(q, keys, values, seen, c)));
    const g = norm(y, p("post_attention_layernorm"), c.rms_norm_eps), up = times(p("mlp.up_proj"), g);
    const hidden = times(p("mlp.gate_proj"), g).map((gate, i) => gate / (1 + Math.exp(-gate)) * up[i]);
    return plus(y, times(p("mlp.down_proj"), hidden));
  });
  return [out, { keys, values }];
}

const index = JSON.parse(readFileSync(`${folder}/index.json`, "utf8"));
if (index.schema_version !== 1) { console.error(`schema version ${index.schema_version}, not 1`); process.exit(2); }
let cases = 0, failed = 0, worst = [0, ""];
for (const one of index.cases.filter((c) => c.kind !== "training")) {
  const { config: c, weights } = index.models[one.model], w = load(weights).tensors;
  const { tensors, metadata } = load(one.trace), caches = [];
  JSON.parse(metadata.calls).forEach(({ after }, n) => {
    const get = (name) => tensors[`call.${n}.${name}`], [rows, length] = tensors.shape[`call.${n}.tokens`];
    let error = 0, size = 0;
    caches.push(range(rows).map((b) => {
      const empty = range(c.num_hidden_layers).map(() => ({ keys: [], values: [] }));
      const before = after === null ? empty : caches[after][b], past = before[0].keys.length, own = [];
      const positions = range(length).map((t) => get("positions")?.[b * length + t] ?? past + t);
      const sees = (t, s) => get("mask") ? get("mask")[(b * length + t) * (past + length) + s] : s <= past + t;
      const row = (v) => w["model.embed_tokens.weight"].slice(v * c.hidden_size, (v + 1) * c.hidden_size);
      let x = range(length).map((t) => row(get("tokens")[b * length + t]));
      for (const l of range(c.num_hidden_layers)) [x, own[l]] = block(x, w, l, c, positions, sees, before[l]);
      const [first, end] = one.real[n]?.[b] ?? [0, length], head = w["lm_head.weight"] ?? w["model.embed_tokens.weight"];
      for (let t = first; t < end; t++)
        times(head, norm(x[t], w["model.norm.weight"], c.rms_norm_eps)).forEach((a, i) => {
          const e = get("logits")[(b * length + t) * c.vocab_size + i];  // max |a - e| / max |e|
          [error, size] = [Math.max(error, Number.isFinite(a) ? Math.abs(a - e) : Infinity), Math.max(size, Math.abs(e))];
        });
      return own;
    }));
    const share = error / size / one.bounds[`call.${n}.logits`][0];
    if (share > worst[0]) worst = [share, one.id];
    if (!(share <= 1)) { console.log(`FAILED ${one.id}: ${share} times its bound`); failed++; }
  });
  cases++;
}
console.log(`${cases} cases, largest error ${worst[0]} of its bound (${worst[1]})`);
process.exit(failed || !cases ? 1 : 0);
