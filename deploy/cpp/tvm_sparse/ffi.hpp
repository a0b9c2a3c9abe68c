// TVM's C interface, taken from the libraries in the package: nothing is linked, and nothing else of
// TVM needs to be installed.
#pragma once

#include <dlfcn.h>
#include <tvm/ffi/c_api.h>

#include <initializer_list>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "manifest.hpp"

namespace tvm_sparse {
namespace ffi {

struct Api {
  decltype(&TVMFFIFunctionGetGlobal) get_global = nullptr;
  decltype(&TVMFFIFunctionCall) call = nullptr;
  decltype(&TVMFFIObjectDecRef) drop = nullptr;
  decltype(&TVMFFIErrorMoveFromRaised) take_error = nullptr;
  decltype(&TVMFFITensorFromDLPack) tensor_from_dlpack = nullptr;
  std::string tvm_version;
};

inline Api& api() {
  static Api instance;
  return instance;
}

inline void* open_library(const std::string& path) {
  // Global: the model's library looks its helpers up among the process's symbols.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (!library) throw Error(std::string("TVM's runtime cannot be loaded: ") + dlerror());
  return library;
}

template <typename Function>
void find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  if (!*function) throw Error(std::string("TVM's runtime lacks the function ") + name);
}

// Loads the runtime of a package; a process has one, which serves the packages loaded later.
inline void load_runtime(const std::string& folder, const Manifest& manifest) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!api().tvm_version.empty()) {
    if (api().tvm_version != manifest.tvm_version)
      throw Error("the package in '" + folder + "' is for TVM " + manifest.tvm_version +
                  ", and this process runs one for TVM " + api().tvm_version);
    return;
  }
  Api loaded;
  void* library = open_library(folder + "/libtvm_ffi.so");
  find(library, "TVMFFIFunctionGetGlobal", &loaded.get_global);
  find(library, "TVMFFIFunctionCall", &loaded.call);
  find(library, "TVMFFIObjectDecRef", &loaded.drop);
  find(library, "TVMFFIErrorMoveFromRaised", &loaded.take_error);
  find(library, "TVMFFITensorFromDLPack", &loaded.tensor_from_dlpack);
  for (const char* name : {"libtvm_runtime.so", "libtvm_runtime_extra.so"})
    if (manifest.has_file(name)) open_library(folder + "/" + name);
  loaded.tvm_version = manifest.tvm_version;
  api() = loaded;
}

// A value of TVM's; objects are counted, and let go with it.
class Value {
 public:
  Value() { value_.type_index = kTVMFFINone; }
  static Value owning(std::int32_t type_index, TVMFFIObjectHandle object) {
    Value value;
    value.value_.type_index = type_index;
    value.value_.v_obj = static_cast<TVMFFIObject*>(object);
    return value;
  }
  Value(Value&& other) noexcept : value_(std::exchange(other.value_, TVMFFIAny{})) {}
  Value& operator=(Value&& other) noexcept {
    std::swap(value_, other.value_);
    return *this;
  }
  ~Value() {
    if (is_object()) api().drop(value_.v_obj);
  }

  std::int32_t type() const { return value_.type_index; }
  bool is_object() const { return value_.type_index >= kTVMFFIStaticObjectBegin; }
  TVMFFIObjectHandle object() const { return value_.v_obj; }
  std::int64_t integer() const { return value_.v_int64; }
  const TVMFFIAny& view() const { return value_; }
  TVMFFIAny* out() { return &value_; }

 private:
  TVMFFIAny value_ = {};
};

inline TVMFFIAny view_of(std::int64_t number) {
  TVMFFIAny view = {};
  view.type_index = kTVMFFIInt;
  view.v_int64 = number;
  return view;
}

inline TVMFFIAny view_of(const char* text) {
  TVMFFIAny view = {};
  view.type_index = kTVMFFIRawStr;
  view.v_c_str = text;
  return view;
}

inline TVMFFIAny view_of(const Value& value) { return value.view(); }

// The first line of what TVM complained of last.
inline std::string last_error() {
  TVMFFIObjectHandle raised = nullptr;
  api().take_error(&raised);
  if (!raised) return "an unknown error";
  const Value owner = Value::owning(kTVMFFIError, raised);
  const TVMFFIByteArray text = TVMFFIErrorGetCellPtr(raised)->message;
  const std::string message(text.data, text.size);
  return message.substr(0, message.find('\n'));
}

inline Value call(const Value& function, std::vector<TVMFFIAny> arguments) {
  Value result;
  const int count = static_cast<int>(arguments.size());
  if (api().call(function.object(), arguments.data(), count, result.out()) != 0)
    throw Error(last_error());
  return result;
}

inline Value global(const std::string& name) {
  const TVMFFIByteArray key = {name.data(), name.size()};
  TVMFFIObjectHandle function = nullptr;
  if (api().get_global(&key, &function) != 0 || !function)
    throw Error("TVM's runtime lacks the function " + name);
  return Value::owning(kTVMFFIFunction, function);
}

// A function of a module, which may have imported it.
inline Value function_of(const Value& module, const char* name) {
  TVMFFIAny query_imports = view_of(std::int64_t{1});
  query_imports.type_index = kTVMFFIBool;
  Value function =
      call(global("ffi.ModuleGetFunction"), {view_of(module), view_of(name), query_imports});
  if (function.type() != kTVMFFIFunction)
    throw Error(std::string("the library has no function ") + name);
  return function;
}

}  // namespace ffi
}  // namespace tvm_sparse
