// Computes the logits of every golden vector that has calls, and compares them with the file's.
// C++17 without dependencies:  c++ -std=c++17 -O2 reader.cpp -o reader && ./reader FOLDER
// It reads index.txt, whose lines are words (docs/vectors.md). Copy what your port's test needs.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <map>
#include <string>
#include <vector>
using Vec = std::vector<double>;

struct Model {
  std::string file, rope;
  std::int64_t dim, layers, heads, kv, width, hidden, vocab, tied;
  double eps, theta, factor, low, high, context;
  std::map<std::string, std::int64_t> at;  // where each weight lies
};
struct Cache { std::vector<std::vector<Vec>> k, v; };  // [layer][key], all its heads in one row

template <class T> std::vector<T> read(const std::string& path, std::int64_t at, std::int64_t count) {
  std::vector<T> values(count);
  std::ifstream file(path, std::ios::binary);
  file.seekg(at);
  if (!file.read(reinterpret_cast<char*>(values.data()), count * sizeof(T))) throw path + ": too short";
  return values;
}
Vec weight(const std::string& folder, const Model& m, const std::string& name, std::int64_t count) {
  const auto stored = read<float>(folder + "/" + m.file, m.at.at(name), count);
  return Vec(stored.begin(), stored.end());
}
Vec times(const Vec& matrix, const Vec& x) {  // W x, W [out, in]
  Vec y(matrix.size() / x.size());
  for (std::size_t i = 0; i < matrix.size(); i++) y[i / x.size()] += matrix[i] * x[i % x.size()];
  return y;
}
Vec norm(const Vec& x, const Vec& w, double eps) {
  double square = 0;
  for (double one : x) square += one * one;
  Vec y(x);
  for (std::size_t i = 0; i < x.size(); i++) y[i] = x[i] / std::sqrt(square / x.size() + eps) * w[i];
  return y;
}
void rotate(Vec& x, const Model& m, double position) {  // each head's pairs (i, i + width / 2)
  const double pi = std::acos(-1.0);
  for (std::int64_t i = 0, half = m.width / 2; i < half; i++) {
    const double plain = std::pow(m.theta, -2.0 * i / m.width), turns = m.context * plain / (2 * pi);
    double kept = m.rope == "linear" ? 0 : 1;  // the share of the frequency that is not divided
    if (m.rope == "llama3") kept = std::clamp((turns - m.low) / (m.high - m.low), 0.0, 1.0);
    const double angle = position * plain * (kept + (1 - kept) / m.factor);
    for (std::size_t head = 0; head < x.size(); head += m.width) {
      const double a = x[head + i], b = x[head + i + half];
      x[head + i] = a * std::cos(angle) - b * std::sin(angle);
      x[head + i + half] = b * std::cos(angle) + a * std::sin(angle);
    }
  }
}
Vec attend(const Vec& q, const std::vector<Vec>& keys, const std::vector<Vec>& values,
           const std::vector<bool>& seen, const Model& m) {
  Vec out(q.size());
  for (std::int64_t h = 0; h < m.heads; h++) {
    const std::int64_t from = h / (m.heads / m.kv) * m.width;  // the head's key/value head
    Vec score(keys.size(), -INFINITY);
    double top = -INFINITY, total = 0;
    for (std::size_t s = 0; s < keys.size(); s++) {
      if (!seen[s]) continue;
      score[s] = 0;
      for (std::int64_t i = 0; i < m.width; i++) score[s] += q[h * m.width + i] * keys[s][from + i];
      top = std::max(top, score[s] /= std::sqrt(m.width));
    }
    for (std::size_t s = 0; s < keys.size(); s++) if (seen[s]) total += score[s] = std::exp(score[s] - top);
    for (std::size_t s = 0; s < keys.size(); s++)
      for (std::int64_t i = 0; seen[s] && i < m.width; i++)
        out[h * m.width + i] += score[s] / total * values[s][from + i];
  }
  return out;
}

int main(int count, char** arguments) try {
  const std::string folder = count > 1 ? arguments[1] : ".";
  std::ifstream index(folder + "/index.txt");
  std::string word, version, name, trace, model, worst_case;
  std::map<std::string, Model> models;
  std::vector<std::vector<Cache>> caches;  // [call][row]
  std::int64_t cases = 0, failed = 0;
  double worst = 0;
  if (!(index >> word >> version) || word != "llama-vectors" || version != "1") throw folder + ": no index.txt of version 1";
  while (index >> word) {
    if (word == "model") {
      index >> model;
      Model& m = models[model];
      index >> m.file >> m.dim >> m.layers >> m.heads >> m.kv >> m.width >> m.hidden >> m.vocab >> m.eps >> m.theta
            >> m.tied >> m.rope >> m.factor >> m.low >> m.high >> m.context;
    } else if (word == "weight") {
      index >> word;
      index >> models[model].at[word];
    } else if (word == "case") {
      index >> name >> model >> trace;
      caches.clear();
      cases++;
    } else if (word == "call") {
      const Model& m = models.at(model);
      std::int64_t after, rows, length, at_tokens, at_positions, at_mask, at_logits;
      double bound, error = 0, size = 0;
      index >> after >> rows >> length >> at_tokens >> at_positions >> at_mask >> at_logits >> bound >> word;
      std::vector<Cache> cache = after < 0 ? std::vector<Cache>(rows) : caches.at(after);
      for (Cache& one : cache) one.k.resize(m.layers), one.v.resize(m.layers);
      const std::int64_t past = cache[0].k[0].size(), keys = past + length;
      const std::string path = folder + "/" + trace;
      const auto tokens = read<std::int64_t>(path, at_tokens, rows * length);
      const auto expected = read<double>(path, at_logits, rows * length * m.vocab);
      const auto positions = at_positions < 0 ? tokens : read<std::int64_t>(path, at_positions, rows * length);
      const auto mask = read<std::uint8_t>(path, at_mask < 0 ? 0 : at_mask, at_mask < 0 ? 0 : rows * length * keys);
      const Vec embedding = weight(folder, m, "model.embed_tokens.weight", m.vocab * m.dim);
      const Vec head = m.tied ? embedding : weight(folder, m, "lm_head.weight", m.vocab * m.dim);
      for (std::int64_t b = 0; b < rows; b++) {
        std::int64_t first, end;  // the row's real tokens
        index >> first >> end;
        std::vector<Vec> x(length);
        for (std::int64_t t = 0; t < length; t++) {
          const auto row = embedding.begin() + tokens[b * length + t] * m.dim;
          x[t] = Vec(row, row + m.dim);
        }
        for (std::int64_t l = 0; l < m.layers; l++) {
          auto w = [&](const std::string& part, std::int64_t size) {
            return weight(folder, m, "model.layers." + std::to_string(l) + "." + part + ".weight", size);
          };
          const std::int64_t wide = m.heads * m.width, narrow = m.kv * m.width;
          const Vec n1 = w("input_layernorm", m.dim), n2 = w("post_attention_layernorm", m.dim);
          const Vec wq = w("self_attn.q_proj", wide * m.dim), wk = w("self_attn.k_proj", narrow * m.dim);
          const Vec wv = w("self_attn.v_proj", narrow * m.dim), wo = w("self_attn.o_proj", wide * m.dim);
          const Vec wg = w("mlp.gate_proj", m.hidden * m.dim), wu = w("mlp.up_proj", m.hidden * m.dim);
          const Vec wd = w("mlp.down_proj", m.hidden * m.dim);
          std::vector<Vec> queries(length);
          for (std::int64_t t = 0; t < length; t++) {
            const Vec h = norm(x[t], n1, m.eps);
            const double position = at_positions < 0 ? past + t : positions[b * length + t];
            Vec k = times(wk, h);
            queries[t] = times(wq, h);
            rotate(queries[t], m, position), rotate(k, m, position);
            cache[b].k[l].push_back(k), cache[b].v[l].push_back(times(wv, h));
          }
          for (std::int64_t t = 0; t < length; t++) {
            std::vector<bool> seen(keys);
            for (std::int64_t s = 0; s < keys; s++) seen[s] = at_mask < 0 ? s <= past + t : mask[(b * length + t) * keys + s];
            const Vec mixed = times(wo, attend(queries[t], cache[b].k[l], cache[b].v[l], seen, m));
            for (std::int64_t i = 0; i < m.dim; i++) x[t][i] += mixed[i];
            const Vec h = norm(x[t], n2, m.eps);
            Vec gate = times(wg, h), up = times(wu, h);
            for (std::int64_t i = 0; i < m.hidden; i++) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
            const Vec down = times(wd, gate);
            for (std::int64_t i = 0; i < m.dim; i++) x[t][i] += down[i];
          }
        }
        for (std::int64_t t = first; t < end; t++) {
          const Vec logits = times(head, norm(x[t], weight(folder, m, "model.norm.weight", m.dim), m.eps));
          for (std::int64_t i = 0; i < m.vocab; i++) {  // the error's measure: max |a - e| / max |e|
            const double e = expected[(b * length + t) * m.vocab + i];
            error = std::max(error, std::isfinite(logits[i]) ? std::abs(logits[i] - e) : INFINITY);
            size = std::max(size, std::abs(e));
          }
        }
      }
      caches.push_back(cache);
      if (error / size / bound > worst) worst = error / size / bound, worst_case = name;
      if (!(error / size <= bound)) std::cout << "FAILED " << name << ": error " << error / size << ", bound " << bound << "\n", failed++;
    }
  }
  std::cout << cases << " cases, largest error " << worst << " of its bound (" << worst_case << ")\n";
  return failed || !cases;
} catch (const std::string& error) {
  std::cerr << error << "\n";
  return 2;
}
