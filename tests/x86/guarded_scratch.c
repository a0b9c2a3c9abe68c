/* Stands in for TVM's allocator of scratch memory in kernels: it lies between inaccessible pages,
   ends at the rear one, and begins as NaN, so that strays die and unwritten elements show. */

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGE = 4096, ALIGNMENT = 64, POISON = 0xFF };

static uint64_t round_up(uint64_t size, uint64_t step) { return (size + step - 1) / step * step; }

/* Pages: the length of the whole, inaccessible, the scratch memory, inaccessible. */
void *TVMBackendAllocWorkspace(int device_type, int device_id, uint64_t size, int code, int bits) {
  uint64_t used = round_up(size ? size : 1, ALIGNMENT);
  uint64_t inner = round_up(used, PAGE);
  uint64_t length = inner + 3 * PAGE;
  (void)device_type, (void)device_id, (void)code, (void)bits;
  char *first =
      mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (first == MAP_FAILED) return NULL;
  *(uint64_t *)first = length;
  char *scratch = first + 2 * PAGE;
  memset(scratch, POISON, inner);
  mprotect(first + PAGE, PAGE, PROT_NONE);
  mprotect(scratch + inner, PAGE, PROT_NONE);
  return scratch + inner - used;
}

int TVMBackendFreeWorkspace(int device_type, int device_id, void *pointer) {
  (void)device_type, (void)device_id;
  char *first = (char *)((uintptr_t)pointer / PAGE * PAGE) - 2 * PAGE;
  return munmap(first, *(uint64_t *)first);
}
