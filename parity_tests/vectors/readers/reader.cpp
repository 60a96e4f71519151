// Runs a Llama on every golden vector that has calls, and holds its logits to their bounds.
//   c++ -std=c++17 -O2 reader.cpp -o reader && ./reader FOLDER
// Your port takes the place of llama.hpp. docs/vectors.md has the words of index.txt.
#include <fstream>
#include <iostream>
#include "llama.hpp"
using std::int64_t, std::string, std::vector;

const int PRECISION = 0;  // whose bound: 0 is float64, 1 float32, 2 bfloat16, 3 float16

template <class T> vector<T> read(const string& path, int64_t at, int64_t count) {
  vector<T> values(count);
  std::ifstream file(path, std::ios::binary);
  file.seekg(at).read(reinterpret_cast<char*>(values.data()), count * sizeof(T));
  if (!file) throw std::runtime_error(path + ": cannot be read");
  return values;
}

int main(int count, char** arguments) try {
  const string folder = count > 1 ? string(arguments[1]) + "/" : "";
  std::ifstream index(folder + "index.txt");
  string word, version, model, name, path;
  std::map<string, Model> models;
  vector<vector<Cache>> caches;  // [call][row]
  int64_t cases = 0, failed = 0, at, size;
  double worst = 0;  // error, as a part of its bound
  if (!(index >> word >> version) || word != "llama-vectors" || version != "1")
    throw std::runtime_error(folder + "index.txt: is no index of version 1");
  index.exceptions(std::ios::failbit);  // thrown where it breaks off
  while (index >> word, word != "end") {
    if (word == "model") {
      index >> model >> path;
      Model& m = models[model];
      index >> m.dim >> m.layers >> m.heads >> m.kv_heads >> m.width >> m.hidden >> m.vocab >> m.eps
            >> m.theta >> m.tied >> m.rope >> m.factor >> m.low >> m.high >> m.context;
    } else if (word == "weight") {
      index >> name >> at >> size;
      const auto stored = read<float>(folder + path, at, size);
      models.at(model).weights[name] = Vec(stored.begin(), stored.end());
    } else if (word == "case") {
      index >> name >> model >> path;
      caches.clear(), cases++;
    } else if (word == "call") {
      int64_t after, cached, rows, length, at_tokens, at_positions, at_mask, at_logits, first, end;
      double bounds[5], error = 0, largest = 0;
      index >> after >> cached >> rows >> length >> at_tokens >> at_positions >> at_mask >> at_logits;
      for (double& bound : bounds) index >> bound;
      caches.push_back(after < 0 ? vector<Cache>(rows) : caches.at(after));
      const Model& m = models.at(model);
      const int64_t keys = cached + length;
      index >> word;  // "real", with the row's real tokens: padding is not judged
      for (int64_t b = 0; b < rows; b++) {
        index >> first >> end;
        const int64_t row = b * length * 8, cells = length * keys, numbers = length * m.vocab;
        const auto tokens = read<int64_t>(folder + path, at_tokens + row, length);
        const auto expected = read<double>(folder + path, at_logits + b * numbers * 8, numbers);
        vector<int64_t> positions(length);
        vector<std::uint8_t> mask(cells);  // causal, unless the case has one
        for (int64_t t = 0; t < length; t++) positions[t] = cached + t;
        for (int64_t i = 0; i < cells; i++) mask[i] = i % keys <= cached + i / keys;
        if (at_positions >= 0) positions = read<int64_t>(folder + path, at_positions + row, length);
        if (at_mask >= 0) mask = read<std::uint8_t>(folder + path, at_mask + b * cells, cells);
        const auto logits = forward(m, tokens, positions, mask, caches.back()[b]);
        for (int64_t i = first * m.vocab; i < end * m.vocab; i++) {
          const double off = std::abs(logits.at(i / m.vocab).at(i % m.vocab) - expected[i]);
          error = std::isfinite(off) ? std::max(error, off) : INFINITY;
          largest = std::max(largest, std::abs(expected[i]));
        }
      }
      const double share = error / largest / bounds[PRECISION];
      worst = std::max(worst, share);
      if (share <= 1) continue;
      std::cout << "FAILED " << name << ": error " << error / largest << ", " << share << " of its bound\n";
      failed++;
    }
  }
  std::cout << cases << " cases, " << failed << " calls failed, largest error " << worst << " of its bound\n";
  return failed > 0 || cases == 0;
} catch (const std::ios_base::failure&) {
  std::cerr << "error: index.txt is not complete\n";
  return 2;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 2;
}
