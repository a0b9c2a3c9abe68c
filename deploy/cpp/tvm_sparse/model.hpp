// A model of a package, ready to run:
//
//   tvm_sparse::Model model("dist");
//   std::vector<tvm_sparse::Array> outputs = model.run({{"x", tvm_sparse::read_npy("x.npy")}});
//
// Loading a package runs its code: load those of authors whom you trust. What fails throws
// tvm_sparse::Error, whose message is a sentence. Models are not copied; run may be called from
// several threads, which wait for each other.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "array.hpp"
#include "ffi.hpp"
#include "manifest.hpp"
#include "npy.hpp"
#include "quiet.hpp"
#include "threads.hpp"

namespace tvm_sparse {

namespace checks {

inline std::string count(std::size_t number, const std::string& noun) {
  return std::to_string(number) + " " + noun + (number == 1 ? "" : "s");
}

inline std::string quoted(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "'" : ", '") + name + "'";
  return text;
}

using Sizes = std::map<std::string, std::pair<std::int64_t, std::string>>;

inline void check_input(const TensorSpec& spec, const Array& array, Sizes* sizes) {
  if (spec.dtype != array.dtype().name)
    throw Error("input '" + spec.name + "' is " + array.dtype().name + ", and the model wants " +
                spec.dtype + ": convert it with .astype('" + spec.dtype + "')");
  const Shape& shape = array.shape();
  if (shape.size() != spec.shape.size())
    throw Error("input '" + spec.name + "' has " + count(shape.size(), "dimension") + ", " +
                text_of(shape) + "; the model wants " + text_of(spec));
  const std::string both = "input '" + spec.name + "' has shape " + text_of(shape) +
                           ", and the model wants " + text_of(spec);
  for (std::size_t i = 0; i < shape.size(); ++i) {
    const Dimension& wanted = spec.shape[i];
    if (wanted.size >= 0) {
      if (wanted.size != shape[i]) throw Error(both);
      continue;
    }
    const auto& first = sizes->insert({wanted.symbol, {shape[i], spec.name}}).first->second;
    if (first.first != shape[i])
      throw Error(both + ": '" + wanted.symbol + "' is " + std::to_string(first.first) +
                  " in input '" + first.second + "' and " + std::to_string(shape[i]) + " here");
  }
}

}  // namespace checks

class Model {
 public:
  using Inputs = std::map<std::string, Array>;

  // threads: by default TVM_NUM_THREADS, then what the model was compiled for.
  explicit Model(const std::string& folder, int threads = 0) : manifest_(read_manifest(folder)) {
    if (threads < 0) throw Error("a module runs on one thread or more, not on " + std::to_string(threads));
    const char* variable = std::getenv("TVM_NUM_THREADS");
    if (threads == 0 && variable) threads = std::max(0, std::atoi(variable));
    threads_ = threads ? threads : manifest_.threads;
    // A name without a folder would be looked for among the system's libraries.
    const std::string file = (folder.empty() ? "." : folder) + "/" + manifest_.library;
    check_sizes(folder, manifest_);
    check_processor(file, manifest_);
    if (manifest_.target_kind != "llvm")
      throw Error("the module in '" + folder + "' runs on a GPU; load.py of its folder runs it, and " +
                  "this program runs models of processors");
    ffi::load_runtime(folder, manifest_);
    try {
      const Quiet quiet;
      const ffi::Value library =
          ffi::call(ffi::global("ffi.ModuleLoadFromFile"), {ffi::view_of(file.c_str())});
      machine_ = ffi::call(ffi::function_of(library, "vm_load_executable"), {});
      // The processor, its first device, and an allocator that keeps memory for the next call.
      ffi::call(ffi::function_of(machine_, "vm_initialization"),
                {ffi::view_of(std::int64_t{kDLCPU}), ffi::view_of(std::int64_t{0}),
                 ffi::view_of(std::int64_t{2})});
      main_ = ffi::function_of(machine_, "main");
    } catch (const Error& error) {
      throw Error("'" + file + "' cannot be loaded (it was built with TVM " +
                  manifest_.tvm_version + "): " + error.what());
    }
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const std::vector<TensorSpec>& inputs() const { return manifest_.inputs; }
  const std::vector<TensorSpec>& outputs() const { return manifest_.outputs; }

  // Takes every input by its name; returns the outputs in the order of outputs().
  std::vector<Array> run(const Inputs& inputs) {
    std::vector<const Array*> arrays = by_name(inputs);
    checks::Sizes sizes;
    for (std::size_t i = 0; i < arrays.size(); ++i)
      checks::check_input(manifest_.inputs[i], *arrays[i], &sizes);
    const std::lock_guard<std::mutex> lock(mutex_);
    threads::use(threads_);
    return call(arrays);
  }

 private:
  std::vector<const Array*> by_name(const Inputs& inputs) const {
    std::vector<std::string> wanted, unknown, missing;
    std::vector<const Array*> arrays;
    for (const TensorSpec& spec : manifest_.inputs) {
      wanted.push_back(spec.name);
      const auto found = inputs.find(spec.name);
      if (found == inputs.end())
        missing.push_back(spec.name);
      else
        arrays.push_back(&found->second);
    }
    for (const auto& input : inputs)
      if (std::find(wanted.begin(), wanted.end(), input.first) == wanted.end())
        unknown.push_back(input.first);
    if (unknown.empty() && missing.empty()) return arrays;
    std::string text = "the model ";
    if (!unknown.empty()) text += "does not know " + checks::quoted(unknown);
    if (!unknown.empty() && !missing.empty()) text += " and ";
    if (!missing.empty()) text += "misses " + checks::quoted(missing);
    throw Error(text + "; its inputs are " + checks::quoted(wanted));
  }

  std::vector<Array> call(const std::vector<const Array*>& arrays) const {
    // Tensors that see the caller's memory, which nothing writes to.
    std::vector<ffi::Value> tensors;
    std::vector<TVMFFIAny> views;
    for (const Array* array : arrays) {
      tensors.push_back(tensor_of(*array));
      views.push_back(ffi::view_of(tensors.back()));
    }
    std::vector<Array> outputs;
    try {
      copy_out(ffi::call(main_, views), &outputs);
    } catch (const Error& error) {
      throw Error(std::string("the model failed on these inputs: ") + error.what());
    }
    if (outputs.size() != manifest_.outputs.size())
      throw Error("the model gave " + checks::count(outputs.size(), "output") +
                  ", and its manifest names " + std::to_string(manifest_.outputs.size()));
    return outputs;
  }

  // What a tensor is made of. The virtual machine may keep one that it returned until its next call,
  // so each goes with its tensor; the array's memory is not touched by then.
  struct Source {
    DLManagedTensor managed = {};
    Shape shape;
  };

  static ffi::Value tensor_of(const Array& array) {
    auto source = std::make_unique<Source>();
    source->shape = array.shape();
    source->managed.manager_ctx = source.get();
    source->managed.deleter = [](DLManagedTensor* self) {
      delete static_cast<Source*>(self->manager_ctx);
    };
    DLTensor& tensor = source->managed.dl_tensor;
    tensor.data = const_cast<void*>(array.data());
    tensor.device = {kDLCPU, 0};
    tensor.ndim = static_cast<std::int32_t>(source->shape.size());
    tensor.dtype = {array.dtype().code, array.dtype().bits, 1};
    tensor.shape = source->shape.data();
    TVMFFIObjectHandle object = nullptr;
    if (ffi::api().tensor_from_dlpack(&source->managed, 64, 1, &object) != 0)
      throw Error(ffi::last_error());
    source.release();
    return ffi::Value::owning(kTVMFFITensor, object);
  }

  // Results are tensors, or arrays of them; their memory belongs to the virtual machine.
  static void copy_out(const ffi::Value& result, std::vector<Array>* outputs) {
    if (result.type() == kTVMFFIArray) {
      const ffi::Value size = ffi::call(ffi::global("ffi.ArraySize"), {ffi::view_of(result)});
      for (std::int64_t i = 0; i < size.integer(); ++i)
        copy_out(ffi::call(ffi::global("ffi.ArrayGetItem"),
                           {ffi::view_of(result), ffi::view_of(i)}),
                 outputs);
      return;
    }
    if (result.type() != kTVMFFITensor) throw Error("an output is no tensor");
    const DLTensor* tensor = TVMFFITensorGetDLTensorPtr(result.object());
    Array array(dtype_of(tensor->dtype), Shape(tensor->shape, tensor->shape + tensor->ndim));
    const char* data = static_cast<const char*>(tensor->data) + tensor->byte_offset;
    if (array.bytes()) std::memcpy(array.data(), data, array.bytes());
    outputs->push_back(std::move(array));
  }

  static const DType& dtype_of(const DLDataType& type) {
    for (const DType& dtype : dtypes())
      if (type.code == dtype.code && type.bits == dtype.bits && type.lanes == 1) return dtype;
    throw Error("an output is of a type that is not read here: float32, float16, int64, int32 and "
                "bool are");
  }

  Manifest manifest_;
  std::int64_t threads_ = 1;
  std::mutex mutex_;
  ffi::Value machine_, main_;
};

}  // namespace tvm_sparse
