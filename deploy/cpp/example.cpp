// Runs the model of a package on .npy files, prints its outputs, and times it.
//
//   example FOLDER [NAME=FILE.npy ...] [--output NAME=FILE.npy] [--repeat N] [--threads N]
//
// Exit codes: 0 done; 1 the job failed, with one line why; 2 wrong usage.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "tvm_sparse/model.hpp"

namespace {

using tvm_sparse::Array;
using tvm_sparse::Model;

struct Usage : std::exception {};

using Pair = std::pair<std::string, std::string>;

struct Options {
  std::string folder;
  std::vector<Pair> inputs, outputs;
  int repeat = 1;
  int threads = 0;
};

Pair pair_of(const std::string& text) {
  // A name may hold an equals sign; the name of a file rarely does.
  const std::size_t at = text.rfind('=');
  if (at == std::string::npos || at == 0 || at + 1 == text.size()) throw Usage();
  return {text.substr(0, at), text.substr(at + 1)};
}

int number_of(const std::string& text) {
  char* end = nullptr;
  const long number = std::strtol(text.c_str(), &end, 10);
  if (*end || text.empty() || number < 1 || number > 1000000) throw Usage();
  return static_cast<int>(number);
}

Options read_options(const std::vector<std::string>& arguments) {
  Options options;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string& word = arguments[i];
    const bool takes_value = word == "--output" || word == "--repeat" || word == "--threads";
    if (takes_value && ++i == arguments.size()) throw Usage();
    if (word == "--output")
      options.outputs.push_back(pair_of(arguments[i]));
    else if (word == "--repeat")
      options.repeat = number_of(arguments[i]);
    else if (word == "--threads")
      options.threads = number_of(arguments[i]);
    else if (word.compare(0, 2, "--") == 0)
      throw Usage();
    else if (options.folder.empty())
      options.folder = word;
    else
      options.inputs.push_back(pair_of(word));
  }
  if (options.folder.empty()) throw Usage();
  return options;
}

// FNV-1a of the bytes: two runs agree in it when they agree in every bit.
unsigned long long checksum(const Array& array) {
  unsigned long long state = 0xcbf29ce484222325ull;
  const auto* bytes = static_cast<const unsigned char*>(array.data());
  for (std::size_t i = 0; i < array.bytes(); ++i) state = (state ^ bytes[i]) * 0x100000001b3ull;
  return state;
}

std::size_t output_named(const Model& model, const std::string& name) {
  std::vector<std::string> names;
  for (const tvm_sparse::TensorSpec& spec : model.outputs()) names.push_back(spec.name);
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end())
    throw tvm_sparse::Error("the model has no output '" + name + "'; its outputs are " +
                            tvm_sparse::checks::quoted(names));
  return static_cast<std::size_t>(found - names.begin());
}

void run(const Options& options) {
  Model model(options.folder, options.threads);
  for (const Pair& output : options.outputs) output_named(model, output.first);
  Model::Inputs inputs;
  for (const Pair& input : options.inputs)
    inputs.emplace(input.first, tvm_sparse::read_npy(input.second));

  std::vector<Array> outputs = model.run(inputs);
  std::vector<double> milliseconds;
  for (int i = 0; i < options.repeat; ++i) {
    const auto start = std::chrono::steady_clock::now();
    outputs = model.run(inputs);
    const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
    milliseconds.push_back(taken.count());
  }

  for (std::size_t i = 0; i < outputs.size(); ++i)
    std::printf("%s: %s %s checksum %016llx\n", model.outputs()[i].name.c_str(),
                outputs[i].dtype().name, tvm_sparse::text_of(outputs[i].shape()).c_str(),
                checksum(outputs[i]));
  std::sort(milliseconds.begin(), milliseconds.end());
  std::printf("%d runs after one: median %.3f ms, fastest %.3f ms\n", options.repeat,
              milliseconds[milliseconds.size() / 2], milliseconds.front());
  for (const Pair& output : options.outputs)
    tvm_sparse::write_npy(output.second, outputs[output_named(model, output.first)]);
}

}  // namespace

int main(int count, char** arguments) {
  try {
    run(read_options({arguments + 1, arguments + count}));
    return 0;
  } catch (const Usage&) {
    std::fprintf(stderr,
                 "usage: example FOLDER [NAME=FILE.npy ...] [--output NAME=FILE.npy] [--repeat N] "
                 "[--threads N]\n");
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "example: %s\n", error.what());
    return 1;
  }
}
