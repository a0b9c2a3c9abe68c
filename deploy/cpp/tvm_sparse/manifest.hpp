// What a package says of itself: manifest.json in its folder.
#pragma once

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "json.hpp"

namespace tvm_sparse {

// A size that is fixed, or one that calls choose: inputs with the same name in it have to agree.
struct Dimension {
  std::int64_t size = -1;
  std::string symbol;
};

struct TensorSpec {
  std::string name;
  std::string dtype;
  std::vector<Dimension> shape;
};

struct Manifest {
  std::string library;
  std::string target_kind;
  std::int64_t threads = 1;
  std::vector<TensorSpec> inputs, outputs;
  // Instruction sets that the code uses, each with the word for it in /proc/cpuinfo.
  std::vector<std::pair<std::string, std::string>> cpu_flags;
  std::vector<std::pair<std::string, std::int64_t>> files;
  std::string tvm_version;

  bool has_file(const std::string& name) const {
    for (const auto& file : files)
      if (file.first == name) return true;
    return false;
  }
};

inline std::string text_of(const TensorSpec& spec) {
  std::string text = "(";
  for (std::size_t i = 0; i < spec.shape.size(); ++i) {
    const Dimension& dimension = spec.shape[i];
    text += i ? ", " : "";
    text += dimension.size < 0 ? dimension.symbol : std::to_string(dimension.size);
  }
  return text + (spec.shape.size() == 1 ? ",)" : ")");
}

// As it is written for people: x: float32 (batch, 128)
inline std::string describe(const TensorSpec& spec) {
  return spec.name + ": " + spec.dtype + " " + text_of(spec);
}

inline std::vector<TensorSpec> specs_of(const Json& list) {
  std::vector<TensorSpec> specs;
  for (const Json& entry : list.array()) {
    TensorSpec spec{entry.at("name").string(), entry.at("dtype").string(), {}};
    for (const Json& extent : entry.at("shape").array()) {
      Dimension dimension;
      if (extent.kind() == Json::Kind::kString)
        dimension.symbol = extent.string();
      else if ((dimension.size = extent.integer()) < 0)
        throw Error("a size in it is negative");
      spec.shape.push_back(dimension);
    }
    specs.push_back(spec);
  }
  return specs;
}

inline Manifest manifest_of(const std::string& text) {
  const Json data = Json::parse(text);
  if (data.kind() != Json::Kind::kObject || !data.has("kind") ||
      data.at("kind").string() != "tvm_sparse package")
    throw Error("it is not the manifest of a package");
  if (data.at("version").integer() != 1) throw Error("it is of another version than this program");
  const Json& model = data.at("model");
  Manifest manifest;
  manifest.library = data.at("library").string();
  manifest.target_kind = model.at("target").at("kind").string();
  manifest.threads = model.at("threads").integer();
  manifest.inputs = specs_of(model.at("inputs"));
  manifest.outputs = specs_of(model.at("outputs"));
  manifest.tvm_version = model.at("tvm_version").string();
  for (const auto& flag : data.at("cpu_flags").object())
    manifest.cpu_flags.emplace_back(flag.first, flag.second.string());
  for (const auto& file : data.at("files").object())
    manifest.files.emplace_back(file.first, file.second.at("bytes").integer());
  if (manifest.threads < 1) throw Error("its 'threads' is below 1");
  if (!manifest.has_file(manifest.library) || manifest.library.find('/') != std::string::npos)
    throw Error("its list of files lacks the library '" + manifest.library + "'");
  return manifest;
}

inline Manifest read_manifest(const std::string& folder) {
  const std::string path = folder + "/manifest.json";
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw Error("cannot read '" + path + "': " + std::strerror(errno));
  const std::string text((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  try {
    return manifest_of(text);
  } catch (const Error& error) {
    throw Error("'" + path + "' is no manifest of a package: " + error.what());
  }
}

// A copy that was cut off would crash the loader.
inline void check_sizes(const std::string& folder, const Manifest& manifest) {
  for (const auto& file : manifest.files) {
    struct stat found;
    const std::string path = folder + "/" + file.first;
    if (stat(path.c_str(), &found) != 0)
      throw Error("cannot read '" + path + "': " + std::strerror(errno));
    if (found.st_size != file.second)
      throw Error("'" + path + "' has " + std::to_string(found.st_size) +
                  " bytes, and was packaged with " + std::to_string(file.second));
  }
}

// A system that does not tell its flags is taken at its word; what lacks will crash.
inline void check_processor(const std::string& file, const Manifest& manifest) {
  std::ifstream stream("/proc/cpuinfo");
  std::string line, flags, name = "unknown";
  while (std::getline(stream, line)) {
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    if (line.compare(0, 10, "model name") == 0) name = line.substr(std::min(colon + 2, line.size()));
    if (line.compare(0, 5, "flags") == 0) flags = line.substr(colon + 1) + " ";
  }
  if (flags.empty()) return;
  std::string lacking;
  for (const auto& flag : manifest.cpu_flags)
    if (flags.find(" " + flag.second + " ") == std::string::npos)
      lacking += (lacking.empty() ? "" : ", ") + flag.first;
  if (!lacking.empty())
    throw Error("'" + file + "' needs instructions that this machine (" + name + ") lacks: " +
                lacking + "; compile for another target, for example x86-64-v3");
}

}  // namespace tvm_sparse
