/* The function by which an exported library gives its weights to TVM's virtual machine: parts of
   the library's own read-only data, seen as tensors. weights.py writes weights_table.h and compiles
   this file into the library. */

#include <tvm/ffi/c_api.h>

#include "weights_table.h"

/* Code reaches its library's data by distances of 32 bits. Weights may be larger than that: linkers
   put .lrodata at an end of the library, and an address of 64 bits leads there. */
#if defined(__x86_64__)
#define SECTION ".lrodata,\"al\",@progbits"
#else
#define SECTION ".rodata,\"a\",%progbits"
#endif

__asm__(
    ".pushsection " SECTION "\n"
    ".balign 64\n"
    "tvm_sparse_weight_bytes:\n"
    ".incbin \"" WEIGHT_FILE "\"\n"
    ".popsection\n"
    ".pushsection .data.rel.ro,\"aw\"\n"
    ".balign 8\n"
    ".globl tvm_sparse_weight_data\n"
    ".hidden tvm_sparse_weight_data\n"
    "tvm_sparse_weight_data:\n"
    ".quad tvm_sparse_weight_bytes\n"
    ".popsection\n");

#ifdef __cplusplus
extern "C" {
#endif

extern const char* const tvm_sparse_weight_data __attribute__((visibility("hidden")));

static int64_t shapes[] = WEIGHT_SHAPES;
static const uint64_t offsets[WEIGHT_COUNT] = WEIGHT_OFFSETS;
static const int32_t dimensions[WEIGHT_COUNT] = WEIGHT_DIMENSIONS;
static const DLDataType types[WEIGHT_COUNT] = WEIGHT_TYPES;

/* What each tensor is made of. It has to outlive the tensor; there is nothing to free. */
static DLManagedTensor sources[WEIGHT_COUNT];

static void set_object(TVMFFIAny* value, int32_t type_index, void* object) {
  value->type_index = type_index;
  value->zero_padding = 0;
  value->v_obj = (TVMFFIObject*)object;
}

static int make_tensors(TVMFFIAny* tensors, int* made) {
  int64_t* shape = shapes;
  for (*made = 0; *made < WEIGHT_COUNT; ++*made) {
    DLManagedTensor* source = &sources[*made];
    TVMFFIObjectHandle tensor = 0;
    source->dl_tensor.data = (void*)(tvm_sparse_weight_data + offsets[*made]);
    source->dl_tensor.device.device_type = kDLCPU;
    source->dl_tensor.ndim = dimensions[*made];
    source->dl_tensor.dtype = types[*made];
    source->dl_tensor.shape = shape;
    if (TVMFFITensorFromDLPack(source, 64, 1, &tensor)) return -1;
    set_object(&tensors[*made], kTVMFFITensor, tensor);
    shape += dimensions[*made];
  }
  return 0;
}

static int make_array(TVMFFIAny* array) {
  static const char name[] = "ffi.Array";
  const TVMFFIByteArray key = {name, sizeof(name) - 1};
  TVMFFIObjectHandle function = 0;
  TVMFFIAny tensors[WEIGHT_COUNT];
  int made = 0, failed;
  set_object(array, kTVMFFINone, 0);
  if (TVMFFIFunctionGetGlobal(&key, &function)) return -1;
  failed = make_tensors(tensors, &made);
  if (!failed) failed = TVMFFIFunctionCall(function, tensors, WEIGHT_COUNT, array);
  while (made > 0) TVMFFIObjectDecRef(tensors[--made].v_obj);
  TVMFFIObjectDecRef(function);
  return failed;
}

/* Two threads that come first together both make the array, and one of the two is kept. */
__attribute__((visibility("default"))) int __tvm_ffi_tvm_sparse_weights(
    void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {
  static TVMFFIObject* kept = 0;
  TVMFFIObject* array = __atomic_load_n(&kept, __ATOMIC_ACQUIRE);
  (void)self, (void)arguments, (void)count;
  if (!array) {
    TVMFFIAny fresh;
    TVMFFIObject* other = 0;
    if (make_array(&fresh)) return -1;
    array = fresh.v_obj;
    if (!__atomic_compare_exchange_n(&kept, &other, array, 0, __ATOMIC_ACQ_REL,
                                     __ATOMIC_ACQUIRE)) {
      TVMFFIObjectDecRef(array);
      array = other;
    }
  }
  TVMFFIObjectIncRef(array);
  set_object(result, kTVMFFIArray, array);
  return 0;
}

#ifdef __cplusplus
}
#endif
