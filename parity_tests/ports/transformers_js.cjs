// AutoModelForCausalLM of transformers.js, asked by transformers_js.py.
const { packed, numbers, serve } = require('./node_lines.cjs');
const {
  AutoModelForCausalLM, DynamicCache, LogitsProcessor, LogitsProcessorList, Tensor, env,
} = require('@huggingface/transformers');

env.allowRemoteModels = false;
let model, ids, mask, cache; // of Generate: rows of BigInt

const each = (given, change) =>
  Object.fromEntries(Object.entries(given).map(([name, value]) => [name, change(value)]));
const tensor = (given) => new Tensor(given.type, numbers(given), given.dims);
const bigints = (rows) => rows.map((row) => row.map(BigInt));
const joined = (left, right) => left.map((row, i) => [...row, ...right[i]]);
const matrix = (rows) =>
  new Tensor('int64', BigInt64Array.from(rows.flat()), [rows.length, rows[0].length]);

/** Has the given tokens generated, one for each row and step, and keeps the logits of all steps. */
class Forced extends LogitsProcessor {
  constructor(rows) {
    super();
    this.rows = rows; // [B, T]; the token after them is the likeliest one
    this.steps = [];
  }
  _call(_, logits) {
    this.steps.push(packed({ type: 'float32', dims: logits.dims, data: logits.data.slice() }));
    this.rows.forEach((row, i) => {
      const token = row[this.steps.length - 1];
      if (token !== undefined) logits[i].data.fill(-Infinity)[Number(token)] = 0;
    });
    return logits;
  }
}

/** Generate, after the prompt, the tokens that are forced; return the logits of every step. */
async function generate(prompt, real, forced) {
  const logits_processor = new LogitsProcessorList();
  const processor = new Forced(forced);
  logits_processor.push(processor);
  const found = await model.generate({
    inputs: matrix(joined(ids, prompt)),
    attention_mask: matrix(joined(mask, real)),
    past_key_values: cache,
    logits_processor,
    max_new_tokens: forced[0].length + 1,
    do_sample: false,
    return_dict_in_generate: true,
  });
  cache = found.past_key_values;
  const tokens = joined(prompt, forced);
  ids = joined(ids, tokens);
  mask = joined(mask, joined(real, forced.map((row) => row.map(() => 1n))));
  return processor.steps;
}

serve({
  async load({ folder, dtype }) {
    await model?.dispose();
    const session_options = { intraOpNumThreads: 1, logSeverityLevel: 3 };
    model = await AutoModelForCausalLM.from_pretrained(folder, { dtype, session_options });
  },
  async forward({ inputs, past }) {
    const past_key_values = past && new DynamicCache(each(past, tensor));
    return each(await model.forward({ ...each(inputs, tensor), past_key_values }), packed);
  },
  start({ tokens, real }) {
    [ids, mask, cache] = [tokens.map(() => []), tokens.map(() => []), null];
    return generate(bigints(tokens), bigints(real), tokens.map(() => []));
  },
  append({ tokens }) {
    const rows = bigints(tokens);
    const first = rows.map((row) => row.slice(0, 1));
    return generate(first, first.map(() => [1n]), rows.map((row) => row.slice(1)));
  },
});
