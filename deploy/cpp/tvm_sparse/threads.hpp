// TVM's threads: how many a model runs on, and on which cores they run.
//
// TVM keeps one pool for every thread that runs models. Its workers wait for work by spinning; one
// that the system puts on the core of its caller runs in turns with it. So workers may run on every
// core of the process but the caller's.
#pragma once

#include <dirent.h>
#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "ffi.hpp"

namespace tvm_sparse {
namespace threads {

inline constexpr std::int64_t kShareAllCores = -3;

inline std::set<int> of_process() {
  std::set<int> numbers;
  if (DIR* folder = opendir("/proc/self/task")) {
    while (const dirent* entry = readdir(folder))
      if (const int number = std::atoi(entry->d_name)) numbers.insert(number);
    closedir(folder);
  }
  return numbers;
}

// The pool of the calling thread.
struct Pool {
  std::int64_t asked = 0;
  int caller_core = -1;
  cpu_set_t cores;
  std::vector<int> workers;

  void start(std::int64_t count) {
    static std::mutex starting;
    const std::lock_guard<std::mutex> lock(starting);
    CPU_ZERO(&cores);
    sched_getaffinity(0, sizeof cores, &cores);
    std::vector<std::string> names;
    for (int core = 0; core < CPU_SETSIZE; ++core)
      if (CPU_ISSET(core, &cores)) names.push_back(std::to_string(core));
    std::vector<TVMFFIAny> views;
    for (const std::string& name : names) views.push_back(ffi::view_of(name.c_str()));
    const ffi::Value list = ffi::call(ffi::global("ffi.Array"), views);
    const std::set<int> before = of_process();
    const std::int64_t granted = std::min<std::int64_t>(count, static_cast<std::int64_t>(names.size()));
    ffi::call(ffi::global("runtime.config_threadpool"),
              {ffi::view_of(kShareAllCores), ffi::view_of(granted), ffi::view_of(list)});
    const std::set<int> after = of_process();
    std::vector<int> started;
    std::set_difference(after.begin(), after.end(), before.begin(), before.end(),
                        std::back_inserter(started));
    if (!started.empty()) workers = started;
    asked = count;
    caller_core = -1;
  }

  void leave_the_callers_core() {
    const int core = sched_getcpu();
    if (core < 0 || core == caller_core) return;
    caller_core = core;
    cpu_set_t others = cores;
    CPU_CLR(core, &others);
    if (CPU_COUNT(&others) == 0) return;
    // A worker that has ended, or a system that does not allow it: nothing is lost but speed.
    for (const int worker : workers) sched_setaffinity(worker, sizeof others, &others);
  }
};

inline void use(std::int64_t count) {
  thread_local Pool pool;
  if (pool.asked != count) pool.start(count);
  if (count > 1) pool.leave_the_callers_core();
}

}  // namespace threads
}  // namespace tvm_sparse
