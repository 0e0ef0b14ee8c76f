// The file that XNNPACK's packed weights are kept in between processes.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

namespace crayon {

// Loads a method, given the path of a packed file for XNNPACK, or an empty one to pack in memory.
using Load = std::function<void(const std::string& path)>;

// Calls `load` with `path`, or with an empty path where no file can be had there. A file that is absent or damaged is
// made first: `pack` is called to load the weights that belong in it, over another path, and to unload them again.
// Processes wait for each other meanwhile; a file that has its name is never changed. `size`: of the weights, about.
void with_packed_weights(const std::string& path, size_t size, const Load& pack, const Load& load);

}  // namespace crayon
