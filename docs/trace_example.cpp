// How a program writes its activations down, and a training step: made-up numbers.
//
//   g++ -std=c++17 trace_example.cpp -o trace_example && ./trace_example mine.safetensors
#include <cstddef>
#include <cstdint>
#include <exception>
#include <iostream>
#include <vector>

#include "trace_writer.hpp"

namespace {

constexpr std::size_t kBatch = 1, kLength = 3, kDim = 4, kVocab = 5;

// In a real program: the text of the checkpoint's config.json.
constexpr const char* kConfig = R"({
  "model_type": "llama", "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
  "num_key_value_heads": 1, "intermediate_size": 8, "vocab_size": 5,
  "max_position_embeddings": 16, "rms_norm_eps": 1e-05, "rope_theta": 10000.0
})";

void run(const char* path) {
  TraceWriter trace(path);
  trace.metadata("config", kConfig);
  trace.metadata("dtype", "float32");
  trace.metadata("calls", R"([{"name": "prompt", "after": null}])");
  trace.metadata("producer", "trace_example.cpp");

  const std::vector<std::int64_t> tokens{4, 0, 2};
  trace.add("call.0.tokens", "I64", {kBatch, kLength}, tokens.data());

  // Here the forward pass would run, and add each activation as soon as it is computed:
  // embed, then layers.0.attn_norm, layers.0.q, ... layers.0.residual, then norm and logits.
  std::vector<float> embed(kBatch * kLength * kDim);
  for (std::size_t i = 0; i < embed.size(); ++i) embed[i] = 0.5f * static_cast<float>(i) - 2.0f;
  trace.add("call.0.embed", "F32", {kBatch, kLength, kDim}, embed.data());

  std::vector<float> logits(kBatch * kLength * kVocab);
  for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = 1.0f / static_cast<float>(i + 1);
  trace.add("call.0.logits", "F32", {kBatch, kLength, kVocab}, logits.data());

  // Log-probabilities of given tokens: alone they suffice to compare two engines. -100: no target.
  const std::vector<std::int64_t> targets{0, 2, -100};
  trace.add("call.0.targets", "I64", {kBatch, kLength}, targets.data());
  const std::vector<float> logprobs{-1.5f, -1.75f, 0.0f};
  trace.add("call.0.target_logprobs", "F32", {kBatch, kLength}, logprobs.data());

  // A training step: its micro-batches, then as much of its results as there is. A number has no
  // axes. Results of the update, step.0.param.NAME and the moments, need the metadata
  // "hyperparameters" as well.
  trace.add("step.0.batch.0.tokens", "I64", {kBatch, kLength}, tokens.data());
  trace.add("step.0.batch.0.targets", "I64", {kBatch, kLength}, targets.data());
  const float loss = 1.625f;
  trace.add("step.0.loss", "F32", {}, &loss);
  const std::vector<float> gradient{0.5f, -0.25f, 0.0f, 1.0f};
  trace.add("step.0.grad.model.norm.weight", "F32", {kDim}, gradient.data());

  trace.finish();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: trace_example OUT.safetensors\n";
    return 2;
  }
  try {
    run(argv[1]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
