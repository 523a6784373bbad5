# What every build of the plugin consists of: the libraries here, and those of tests/tensorrt_harness.
set(
  VSSM_TENSORRT_SOURCES
  creator.cpp
  exports.cpp
  host.cpp
  kernel.cpp
  node.cpp
  plugin.cpp
  plugin_build.cpp
)
list(TRANSFORM VSSM_TENSORRT_SOURCES PREPEND "${CMAKE_CURRENT_LIST_DIR}/")
