// A Llama in JavaScript's numbers: what stands here for your port. reader.mjs calls forward().
const range = (n) => [...Array(n).keys()];
const dot = (a, b) => a.reduce((sum, one, i) => sum + one * b[i], 0);
const times = (w, x) => range(w.length / x.length).map((i) => dot(x, w.slice(i * x.length)));
const plus = (a, b) => a.map((one, i) => one + b[i]);
const norm = (x, w, eps) => {
  const root = Math.sqrt(dot(x, x) / x.length + eps);
  return x.map((one, i) => one / root * w[i]);
};
function rotate(x, c, position) {  // each head's pairs (i, i + head_dim / 2)
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
function attend(q, keys, values, sees, c) {
  const k = c.head_dim, readers = c.num_attention_heads / c.num_key_value_heads;
  const seen = range(keys.length).filter((s) => sees[s]);
  return range(c.num_attention_heads).flatMap((h) => {
    const of = (row) => row.slice(Math.floor(h / readers) * k, (Math.floor(h / readers) + 1) * k);
    const scores = seen.map((s) => dot(of(keys[s]), q.slice(h * k)) / Math.sqrt(k));
    const weights = scores.map((one) => Math.exp(one - Math.max(...scores)));
    const total = weights.reduce((a, b) => a + b, 0) || 1;  // of no key: zeros
    return range(k).map((i) => dot(weights, seen.map((s) => of(values[s])[i])) / total);
  });
}

// Returns the logits of one row's tokens, and the cache [layer] that has their keys and values too.
// w: arrays by Hugging Face's names, row by row; c: config.json; mask: of each token, of each key
// (the cached ones first) 1 or 0; cache: null before the first call.
export function forward(w, c, tokens, positions, mask, cache) {
  const eps = c.rms_norm_eps, embedding = w["model.embed_tokens.weight"], present = [];
  let x = tokens.map((id) => embedding.slice(id * c.hidden_size, (id + 1) * c.hidden_size));
  for (const l of range(c.num_hidden_layers)) {
    const p = (name) => w[`model.layers.${l}.${name}.weight`];
    const h = x.map((one) => norm(one, p("input_layernorm"), eps));
    const keys = h.map((one, t) => rotate(times(p("self_attn.k_proj"), one), c, positions[t]));
    const values = h.map((one) => times(p("self_attn.v_proj"), one));
    const { k, v } = present[l] = {
      k: [...(cache?.[l].k ?? []), ...keys], v: [...(cache?.[l].v ?? []), ...values],
    };
    x = x.map((one, t) => {
      const q = rotate(times(p("self_attn.q_proj"), h[t]), c, positions[t]);
      const y = plus(one, times(p("self_attn.o_proj"), attend(q, k, v, mask[t], c)));
      const g = norm(y, p("post_attention_layernorm"), eps), up = times(p("mlp.up_proj"), g);
      const inner = times(p("mlp.gate_proj"), g).map((gate, i) => gate / (1 + Math.exp(-gate)) * up[i]);
      return plus(y, times(p("mlp.down_proj"), inner));
    });
  }
  const head = w["lm_head.weight"] ?? embedding;
  return [x.map((one) => times(head, norm(one, w["model.norm.weight"], eps))), present];
}
