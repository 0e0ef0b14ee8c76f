# Debian's cross compiler (package g++-aarch64-linux-gnu), over the aarch64 executorch wheel's SDK.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
# The SDK comes from a folder of its own, and the build's own Python environment holds one for another CPU.
set(CMAKE_FIND_USE_CMAKE_ENVIRONMENT_PATH OFF)
