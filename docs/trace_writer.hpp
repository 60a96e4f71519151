// Writes a trace file (trace-format.md), version 2, in C++17 without dependencies: copy this header.
// trace_example.cpp shows its use: activations, log-probabilities of given tokens, training steps.
//
// Each tensor goes to disk as it is added. The header comes last, into room kept for it at the
// front; until then that room holds zeros, so nobody reads an unfinished file as a trace.
// Every failure throws std::runtime_error. Strings are UTF-8.
#pragma once
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "traces are little-endian and this machine is not"
#endif

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

class TraceWriter {
 public:
  // header_room: bytes kept for the header; a tensor needs about 110.
  explicit TraceWriter(const std::string& path, std::uint64_t header_room = 1 << 20)
      : path_(path), room_((header_room + 7) / 8 * 8), out_(path, std::ios::binary) {
    const std::string zeros(8 + room_, '\0');
    write(zeros.data(), zeros.size());
    metadata("format", "llama-trace");
    metadata("version", "2");
    metadata("axes",
             R"({"embed":"BTD","attn_norm":"BTD","q":"BTHK","k":"BTNK","v":"BTNK",)"
             R"("q_rope":"BTHK","k_rope":"BTNK","attn":"BTHK","attn_proj":"BTD",)"
             R"("attn_residual":"BTD","ffn_norm":"BTD","gate":"BTF","up":"BTF","ffn":"BTF",)"
             R"("ffn_proj":"BTD","residual":"BTD","norm":"BTD","logits":"BTV"})");
  }

  void metadata(const std::string& key, const std::string& value) {
    if (!keys_.insert(key).second) fail("metadata " + key + " set twice");
    metadata_ += (metadata_.empty() ? "" : ",") + quote(key) + ":" + quote(value);
    check_room();
  }

  // Row-major data of dtype F64, F32, BF16, F16, I64, I32, BOOL or U8; it may go afterwards.
  void add(const std::string& name, const std::string& dtype,
           const std::vector<std::uint64_t>& shape, const void* data) {
    static const std::map<std::string, std::uint64_t> sizes{
        {"F64", 8}, {"F32", 4}, {"BF16", 2}, {"F16", 2},
        {"I64", 8}, {"I32", 4}, {"BOOL", 1}, {"U8", 1}};
    if (!sizes.count(dtype)) fail(name + " has the unknown dtype " + dtype);
    if (!names_.insert(name).second) fail(name + " added twice");
    std::uint64_t bytes = sizes.at(dtype);
    std::string axes;
    for (const std::uint64_t length : shape) {
      bytes *= length;
      axes += (axes.empty() ? "" : ",") + std::to_string(length);
    }
    tensors_ += "," + quote(name) + ":{\"dtype\":\"" + dtype + "\",\"shape\":[" + axes +
                "],\"data_offsets\":[" + std::to_string(end_) + ",";
    tensors_ += std::to_string(end_ += bytes) + "]}";
    check_room();
    write(data, bytes);
  }

  void finish() {
    for (const char* key : {"config", "dtype", "calls"})
      if (!keys_.count(key)) fail(std::string("metadata ") + key + " is missing");
    std::string header;
    for (int shift = 0; shift < 64; shift += 8) header += static_cast<char>(room_ >> shift & 0xff);
    header += "{\"__metadata__\":{" + metadata_ + "}" + tensors_ + "}";
    header.resize(8 + room_, ' ');
    out_.seekp(0);
    write(header.data(), header.size());
    out_.close();
    if (!out_) fail("cannot write");
  }

 private:
  [[noreturn]] void fail(const std::string& what) { throw std::runtime_error(path_ + ": " + what); }
  void check_room() {
    if (metadata_.size() + tensors_.size() + 19 > room_) fail("header full; raise header_room");
  }
  void write(const void* data, std::uint64_t bytes) {
    out_.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
    if (!out_) fail("cannot write");
  }
  static std::string quote(const std::string& text) {  // as a JSON string
    std::string quoted = "\"";
    for (const char c : text) {
      char code[8] = {c};
      if (static_cast<unsigned char>(c) < 0x20) std::snprintf(code, sizeof code, "\\u%04x", c);
      if (c == '"' || c == '\\') quoted += '\\';
      quoted += code;
    }
    return quoted + '"';
  }

  const std::string path_;
  const std::uint64_t room_;
  std::ofstream out_;
  std::set<std::string> keys_, names_;
  std::string metadata_, tensors_;  // the header's two parts as JSON, so far
  std::uint64_t end_ = 0;           // bytes of data so far
};
