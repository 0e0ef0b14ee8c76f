// ExecuTorch's thread pool, which XNNPACK computes on as well.
#pragma once

#include "attention.h"

namespace crayon {

ParallelFor thread_pool();

int threads();
bool threads_started();

// 0: as many as there are fast cores. False if the pool cannot have so many. Not while anything computes.
bool start_threads(int count);

// Keeps the calling thread, which computes as well, on the fast cores while it lives. Does nothing where all cores are
// alike.
class OnFastCores {
 public:
  OnFastCores();
  ~OnFastCores();
  OnFastCores(const OnFastCores&) = delete;
  OnFastCores& operator=(const OnFastCores&) = delete;

 private:
  bool moved_ = false;
};

}  // namespace crayon
