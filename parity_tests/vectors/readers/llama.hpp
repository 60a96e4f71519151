// A Llama in double precision: what stands here for your port. reader.cpp calls forward().
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <vector>
using Vec = std::vector<double>;
using std::size_t;

struct Model {
  std::int64_t dim, layers, heads, kv_heads, width, hidden, vocab, tied;  // width: of a head
  double eps, theta, factor, low, high, context;
  std::string rope;  // default, linear or llama3
  std::map<std::string, Vec> weights;  // by Hugging Face's names, row by row
};
struct Cache { std::vector<std::vector<Vec>> k, v; };  // [layer][key], all its heads in one row

inline Vec times(const Vec& w, const Vec& x) {  // W x, W [out, in]
  Vec y(w.size() / x.size());
  for (size_t i = 0; i < w.size(); i++) y[i / x.size()] += w[i] * x[i % x.size()];
  return y;
}
inline void add(Vec& x, const Vec& y) {
  for (size_t i = 0; i < x.size(); i++) x[i] += y[i];
}
inline Vec norm(Vec x, const Vec& w, double eps) {
  double square = 0;
  for (double one : x) square += one * one;
  for (size_t i = 0; i < x.size(); i++) x[i] *= w[i] / std::sqrt(square / x.size() + eps);
  return x;
}
inline Vec rotate(Vec x, const Model& m, double position) {  // each head's pairs (i, i + width / 2)
  const double pi = std::acos(-1.0);
  for (std::int64_t i = 0, half = m.width / 2; i < half; i++) {
    const double plain = std::pow(m.theta, -2.0 * i / m.width), turns = m.context * plain / (2 * pi);
    double kept = m.rope == "linear" ? 0 : 1;  // the share of the frequency that is not divided
    if (m.rope == "llama3") kept = std::clamp((turns - m.low) / (m.high - m.low), 0.0, 1.0);
    const double angle = position * plain * (kept + (1 - kept) / m.factor);
    for (size_t a = i, b = i + half; b < x.size(); a += m.width, b += m.width) {
      const double first = x[a], second = x[b];
      x[a] = first * std::cos(angle) - second * std::sin(angle);
      x[b] = second * std::cos(angle) + first * std::sin(angle);
    }
  }
  return x;
}
inline Vec attend(const Vec& q, const std::vector<Vec>& k, const std::vector<Vec>& v,
                  const std::uint8_t* sees, const Model& m) {
  Vec out(q.size());
  for (std::int64_t h = 0; h < m.heads; h++) {
    const std::int64_t from = h / (m.heads / m.kv_heads) * m.width;  // the head's key/value head
    Vec weight(k.size());
    double top = -INFINITY, total = 0;
    for (size_t s = 0; s < k.size(); s++) {
      for (std::int64_t i = 0; i < m.width; i++) weight[s] += q[h * m.width + i] * k[s][from + i];
      weight[s] = sees[s] ? weight[s] / std::sqrt(m.width) : -INFINITY;
      top = std::max<double>(top, weight[s]);
    }
    for (size_t s = 0; s < k.size(); s++) total += weight[s] = sees[s] ? std::exp(weight[s] - top) : 0;
    for (size_t s = 0; s < k.size(); s++)
      for (std::int64_t i = 0; total > 0 && i < m.width; i++)
        out[h * m.width + i] += weight[s] / total * v[s][from + i];
  }
  return out;
}

// Returns the logits of one row's tokens, and adds their keys and values to its cache.
// mask: of each token a byte for each key, the cached ones first: 1 = may attend.
inline std::vector<Vec> forward(const Model& m, const std::vector<std::int64_t>& tokens,
                                const std::vector<std::int64_t>& positions,
                                const std::vector<std::uint8_t>& mask, Cache& cache) {
  const Vec& embedding = m.weights.at("model.embed_tokens.weight");
  const Vec& head = m.tied ? embedding : m.weights.at("lm_head.weight");
  const size_t length = tokens.size();
  std::vector<Vec> x, q(length);
  for (auto id : tokens) {
    const auto row = embedding.begin() + id * m.dim;
    x.emplace_back(row, row + m.dim);
  }
  cache.k.resize(m.layers), cache.v.resize(m.layers);
  for (std::int64_t l = 0; l < m.layers; l++) {
    auto w = [&](const std::string& part) -> const Vec& {
      return m.weights.at("model.layers." + std::to_string(l) + "." + part + ".weight");
    };
    for (size_t t = 0; t < length; t++) {
      const Vec h = norm(x[t], w("input_layernorm"), m.eps);
      q[t] = rotate(times(w("self_attn.q_proj"), h), m, positions[t]);
      cache.k[l].push_back(rotate(times(w("self_attn.k_proj"), h), m, positions[t]));
      cache.v[l].push_back(times(w("self_attn.v_proj"), h));
    }
    for (size_t t = 0; t < length; t++) {
      const std::uint8_t* sees = &mask[t * cache.k[l].size()];
      add(x[t], times(w("self_attn.o_proj"), attend(q[t], cache.k[l], cache.v[l], sees, m)));
      const Vec h = norm(x[t], w("post_attention_layernorm"), m.eps), up = times(w("mlp.up_proj"), h);
      Vec gate = times(w("mlp.gate_proj"), h);
      for (size_t i = 0; i < gate.size(); i++) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
      add(x[t], times(w("mlp.down_proj"), gate));
    }
  }
  for (Vec& one : x) one = times(head, norm(one, m.weights.at("model.norm.weight"), m.eps));
  return x;
}
